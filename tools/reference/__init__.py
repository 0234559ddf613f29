"""A small, independent PyTorch implementation of BLIP-2's Q-Former and both training stages.

It exists to be compared with: the golden files are made from it, and `bench/train_step.py` times it.
It is written for reading (padded batches, boolean masks, no kernels, no dropout) and shares no code
with the Rust crates, with LAVIS or with transformers; `tools/check_reference.py` compares it with the
latter two.
"""
