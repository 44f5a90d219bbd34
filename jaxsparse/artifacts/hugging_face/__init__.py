"""Checkpoints of Hugging Face's format, as models.GPT and its params, and back."""

from jaxsparse.artifacts.hugging_face.reading import from_hf
from jaxsparse.artifacts.hugging_face.writing import to_hf

__all__ = ["from_hf", "to_hf"]
