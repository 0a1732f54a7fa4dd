"""Export: a smaller model in the formats of other people's engines, each with a certificate."""
