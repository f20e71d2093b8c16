"""Variants of LoRA that a first reading can skip: DoRA, PiSSA and LoftQ."""
