"""Converts a Hugging Face directory for CTranslate2, with its own converter."""

from __future__ import annotations


def convert(source: str, target: str, precision: str) -> None:
    """Writes the model to `target`.

    Raises:
        ValueError: a precision that it does not know, or a model that it cannot convert.
    """
    import ctranslate2

    if precision == "int4":
        raise ValueError("there is no int4 in CTranslate2 on the CPU")
    converter = ctranslate2.converters.TransformersConverter(source, low_cpu_mem_usage=True)
    converter.convert(target, quantization=precision)
