"""The backward pass: ``grad *= factor * upstream`` in place, both heads in one launch.

Traffic: each gradient is read once and written once, or not touched where the whole factor is 1. The host reads
nothing. A gradient of 0 stays 0 whatever the factor: rows that take no part may have a factor of infinity.

Mostly the factor is 1, and a program costs more to launch than its work: so no more programs are launched than run at
a time, and each takes many tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotuning_kernels.backends.triton.checks import check_matrix, check_writable, require
from cotuning_kernels.backends.triton.launch import Launch, blocks, compute_type, most_programs, tile_of, vector

__all__ = ["plan", "scale_gradients_"]


@triton.jit
def _scale_tiles(
    first, tiles, step, grad, stride, width, factor, upstream, upstream_stride, batch,
    BY_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Every ``step``-th tile of ROWS rows of one gradient. A factor of 1 reads and writes no gradient."""
    if first < tiles:
        changes = True
        if not BY_ROW:
            whole = (tl.load(upstream) * tl.load(factor)).to(DTYPE)
            changes = whole != 1
        if changes:
            for tile in range(first.to(tl.int64), tiles, step):
                rows = tile * ROWS + tl.arange(0, ROWS)
                in_batch = rows < batch
                if BY_ROW:
                    scale = tl.load(upstream + rows * upstream_stride, mask=in_batch, other=0.0)
                    scale = (scale * tl.load(factor)).to(DTYPE)
                else:
                    scale = tl.zeros([ROWS], DTYPE) + whole
                changed = in_batch & (scale != 1)
                for start in range(0, width, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    mask = changed[:, None] & (columns < width)[None, :]
                    address = grad + rows[:, None] * stride + columns[None, :]
                    g = tl.load(address, mask=mask, other=0.0).to(DTYPE)
                    g = tl.where(g == 0, g, g * scale[:, None])
                    tl.store(address, g.to(grad.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "source_stride", "target_stride", "upstream_stride", "source_width", "target_width", "batch", "source_tiles",
        "target_tiles",
    ],
    do_not_specialize_on_alignment=["factors", "upstream"],
)  # fmt: skip
def scale_gradients_kernel(
    source_grad, source_stride: tl.int64, target_grad, target_stride: tl.int64, factors, upstream,
    upstream_stride: tl.int64, batch: tl.int64, source_width: tl.int32, target_width: tl.int32,
    source_tiles: tl.int32, target_tiles: tl.int32,
    BY_ROW: tl.constexpr, SOURCE_VEC: tl.constexpr, TARGET_VEC: tl.constexpr,
    SOURCE_ROWS: tl.constexpr, SOURCE_BLOCK: tl.constexpr, SOURCE_DTYPE: tl.constexpr,
    TARGET_ROWS: tl.constexpr, TARGET_BLOCK: tl.constexpr, TARGET_DTYPE: tl.constexpr,
):  # fmt: skip
    """The tiles of the source gradient, then those of the target's, are dealt out to the programs in turn."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    _scale_tiles(
        program, source_tiles, programs, source_grad, source_stride * SOURCE_VEC, source_width * SOURCE_VEC, factors,
        upstream, upstream_stride, batch, BY_ROW, SOURCE_ROWS, SOURCE_BLOCK, SOURCE_DTYPE,
    )  # fmt: skip
    # The program after the one with the last source tile takes the first target tile.
    first = (program + programs - source_tiles % programs) % programs
    _scale_tiles(
        first, target_tiles, programs, target_grad, target_stride * TARGET_VEC, target_width * TARGET_VEC, factors + 1,
        upstream, upstream_stride, batch, BY_ROW, TARGET_ROWS, TARGET_BLOCK, TARGET_DTYPE,
    )  # fmt: skip


def scale_gradients_(source_grad: Tensor, target_grad: Tensor, factors: Tensor, upstream: Tensor) -> None:
    """``cotuning_kernels::scale_gradients_``; a gradient without elements was not asked for."""
    device = factors.device
    require(factors.shape == (2,) and factors.is_floating_point(), "factors must be floating of shape (2,)")
    require(upstream.device == device and upstream.is_floating_point(), f"upstream must be floating on {device}")
    for name, grad in (("source_grad", source_grad), ("target_grad", target_grad)):
        if grad.numel():
            check_matrix(name, grad, device)
            check_writable(name, grad)
            require(
                upstream.dim() == 0 or upstream.shape == (grad.shape[0],), "upstream must have one entry, or one a row"
            )
    with torch.cuda.device_of(factors):
        plan(source_grad, target_grad, factors.contiguous(), upstream).run()


def plan(source_grad: Tensor, target_grad: Tensor, factors: Tensor, upstream: Tensor) -> Launch:
    """Return the launch of one call."""
    batch = max(source_grad.shape[0], target_grad.shape[0])
    source_rows, source_block = tile_of(source_grad.shape[1])
    target_rows, target_block = tile_of(target_grad.shape[1])
    source_vec, target_vec = vector(source_grad), vector(target_grad)
    source_tiles = blocks(source_grad.shape[0], source_rows)
    target_tiles = blocks(target_grad.shape[0], target_rows)
    return Launch(
        scale_gradients_kernel,
        (min(source_tiles + target_tiles, most_programs(source_grad.device)),),
        {
            "source_grad": source_grad,
            "source_stride": source_grad.stride(0) // source_vec,
            "target_grad": target_grad,
            "target_stride": target_grad.stride(0) // target_vec,
            "factors": factors,
            "upstream": upstream,
            "upstream_stride": upstream.stride(0) if upstream.dim() else 0,
            "batch": batch,
            "source_width": source_grad.shape[1] // source_vec,
            "target_width": target_grad.shape[1] // target_vec,
            "source_tiles": source_tiles,
            "target_tiles": target_tiles,
            "BY_ROW": upstream.dim() == 1,
            "SOURCE_VEC": source_vec,
            "TARGET_VEC": target_vec,
            "SOURCE_ROWS": source_rows,
            "SOURCE_BLOCK": source_block,
            "SOURCE_DTYPE": compute_type(source_grad.dtype),
            "TARGET_ROWS": target_rows,
            "TARGET_BLOCK": target_block,
            "TARGET_DTYPE": compute_type(target_grad.dtype),
        },
    )
