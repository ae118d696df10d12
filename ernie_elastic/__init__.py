"""ernie_elastic: train one elastic multimodal MoE, cut smaller ones out of it, serve them compressed without loss."""

__version__ = "0.1.0"
