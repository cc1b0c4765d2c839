"""The one table of tolerances: what a test may be off by, and why. Never loosened to make a test pass.

Tests read ``TOLERANCES["name"]``. Unless the name says otherwise an error is
``max |got - want| / max(1, max |want|)``.
"""

from __future__ import annotations

__all__ = ["REASONS", "TOLERANCES"]

_ROWS: dict[str, tuple[float, str]] = {
    "op_fp64": (
        1e-11,
        "the same sums in another order, in double precision, over at most 64 dependent steps",
    ),
    "op_fp32": (3e-6, "some 20 roundings of 2^-24 = 6e-8 that add up over dependent steps; measured 5e-7"),
    "native_fft": (
        2e-6,
        "issue 3's bound against float64; the kernel's transforms measure 3e-7 up to 2^16 points",
    ),
    "native_exp": (5e-7, "polynomial 1.7e-7, and up to 3 roundings of 2^-24 of the exponent and the result"),
    "fused_rows": (
        2e-6,
        "exp within 5e-7 (native_exp), then at most five roundings of 2^-24 each; sums of 64 squares 5e-7",
    ),
    "fused_rows_relative": (
        4e-6,
        "relative: exp(-16) is off by 16 * 4e-8 from the rounding of its exponent, then roundings of 2^-24",
    ),
    "rotary_angles": (
        1e-6,
        "absolute, at any position: an angle up to 2.5 pi rounded to float32 three times, each 4.8e-7 at "
        "most; measured 5e-7",
    ),
    "linear_attention_fp32": (
        1e-5,
        "running sums of 64 log decays near -20 are rounded by 20 * 2^-24 = 1e-6, a relative error of the "
        "decay between two tokens; measured 3e-6",
    ),
    "model_fp32": (1e-4, "DESIGN.md: whole = chunks = steps to 1e-4; measured 1e-6 to 1e-5 on tiny models"),
    "oracle_fp32": (1e-4, "another implementation sums in another order; issue 2 asks for 1e-4"),
    "zoo_bits_per_byte": (
        0.02,
        "bits per byte on 4 KB, absolute; another machine's rounding moves it by 1e-4, a wrong weight by 1",
    ),
    "reversal_digits_lost": (
        5e-3,
        "issue 2: int8 loses at most 0.5% of the digits; a share of digits, not an error; measured 1.7e-3",
    ),
    "model_int8_cut": (
        1e-5,
        "MatMulNBits rounds activations per row, so a cut changes the order of float sums alone",
    ),
    "linear_int8_cut": (
        3e-5,
        "activations are rounded to 16 bits a block: a float sum in another order before it tips one to the "
        "next of 32767 levels, 3e-5 of the block's largest; measured 1.1e-5 (products alone: equal bits)",
    ),
    "int8_products": (
        0.02,
        "RMS of the difference over RMS: 8-bit codes of weights and activations are off by 0.6% each",
    ),
    "product_int8": (
        1e-4,
        "RMS over RMS: activations of 16 bits with a scale a block, 2^-16 of its largest",
    ),
    "product_int4": (
        0.02,
        "RMS over RMS of uncorrelated products: activations of 8 bits, 0.3% of a block's largest",
    ),
    "product_int6": (0.02, "as product_int4: its activations have 8 bits as well"),
    "distill_exact": (3e-5, "the ridge of 1e-6 against residues that cancel; measured 5e-7 to 9e-6"),
    "qnn_fp16": (
        0.02,
        "RMS over RMS: every intermediate of the HTP has 11 bits (5e-4), some hundred roundings a token and "
        "a state of 18 tokens; measured 6e-4 to 8e-3",
    ),
    "qdq_int8": (
        0.1,
        "RMS over RMS: values between products have 256 levels over their whole range, weights 255 a channel,"
        " 0.6% each, through two layers",
    ),
    "pass_fp32": (3e-6, "as op_fp32: the same product"),
    "pass_fp16": (1e-3, "RMS over RMS: 11 bits a weight"),
    "pass_int8": (0.02, "as int8_products: without the kernel activations have 8 bits as well"),
    "pass_int6": (
        0.03,
        "RMS over RMS: 6 bits a weight in blocks of 32 of a normal matrix, 0.021, and 8-bit activations",
    ),
    "pass_int4": (0.12, "RMS over RMS: 4 bits a weight in blocks of 32 of a normal matrix, 0.1"),
    "tiny_logits_fp32": (1e-5, "RMS of the difference over RMS: float sums in another order"),
    "tiny_logits_fp16": (2e-3, "RMS over RMS: 11 bits, 2e-4 a weight, over two layers"),
    "tiny_logits_int8": (0.05, "RMS over RMS: 0.6% a weight, over two layers of some ten products"),
    "tiny_logits_int8-weights": (0.05, "as tiny_logits_int8: 0.6% a weight"),
    "tiny_logits_int4": (0.5, "RMS over RMS: 10% a weight, over two layers of some ten products"),
    "features": (
        1e-5,
        "absolute, of logarithms up to 25: sums in double precision, then one rounding to float32 (1e-6)",
    ),
    "tiny_kl_fp32": (1e-9, "mean KL in nats; measured 1e-14"),
    "tiny_kl_fp16": (1e-6, "mean KL in nats on tiny random models; measured up to 4e-8"),
    "tiny_kl_int8": (1e-4, "mean KL in nats on tiny random models; measured up to 2.4e-5"),
    "tiny_kl_int4": (1e-2, "mean KL in nats on tiny random models; measured up to 2.1e-3"),
}

TOLERANCES: dict[str, float] = {name: value for name, (value, _) in _ROWS.items()}
REASONS: dict[str, str] = {name: why for name, (_, why) in _ROWS.items()}
