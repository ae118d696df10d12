"""Scores a model on records with checkers."""
