"""Trains sentinels after every sentence that replace all text before them: each sentence is forgotten once it ends."""

from dataclasses import replace

from nanometa.config.tiny_sr import config as sr

config = replace(
    sr,
    markers=replace(sr.markers, closing_reads="all", evict="segment"),
)
