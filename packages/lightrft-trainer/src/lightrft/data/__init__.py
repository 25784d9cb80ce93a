"""Prompts to train on: tasks made from nothing, files, datasets."""
