"""A small real language model with texts, so that the library can be tried without downloading anything."""

from __future__ import annotations

from ecospa_fx.demo.model import ByteLM as ByteLM
from ecospa_fx.demo.model import encode as encode
from ecospa_fx.demo.model import load as load
from ecospa_fx.demo.model import next_byte_loss as next_byte_loss
from ecospa_fx.demo.model import perplexity as perplexity
from ecospa_fx.demo.model import texts as texts
from ecospa_fx.demo.model import windows as windows
