"""Trains the control of tiny_sr.py in which the sentinels stand at random places, about as many as in tiny_sr.

What tiny_sr gains over this run comes from the places: a sentinel there summarizes a sentence."""

from dataclasses import replace

from nanometa.config import MarkerConfig
from nanometa.config.tiny_sr import config as sr

config = replace(
    sr,
    markers=MarkerConfig(marker_place="random", random_marks=35, closing_reads="segment"),
)
