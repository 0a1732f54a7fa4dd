"""The command line `ecospa-fx`."""
