"""The kernels in Triton, and nothing else: what follows the depthwise convolution of a ConvNeXt block.

Tensors are FP16 or BF16, and sums, norms and gains are FP32. A sample's stream and tokens are (positions, C) where
CHANNELS_LAST, else (C, positions); the hidden tensor is (positions, 4C), weights are (in, out). Sums run in a fixed
order, without atomics, so results repeat bit by bit. `loading.py` gives this file compiled or interpreted, and
`launch.py` calls it.
"""

import triton
import triton.language as tl


@triton.jit
def stream_offsets(position, channel, positions, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile (BLOCK_M, BLOCK) in one sample of the stream."""
    if CHANNELS_LAST:
        return position[:, None] * CHANNELS + channel[None, :]
    return channel[None, :] * positions + position[:, None]


@triton.jit
def gelu(value):
    """The exact GELU, by erf."""
    return 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))


@triton.jit
def norm_linear_gelu(
    tokens_ptr, weight_ptr, bias_ptr, hidden_ptr, sums_ptr, positions,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm without affine, linear layer, GELU, and the sums of squares of each tile of positions.

    Grid (⌈4C / BLOCK_N⌉, ⌈positions / BLOCK_M⌉, N). hidden (N, positions, 4C) and sums (N, tiles, 4C) FP32; either may
    be None and is not written then.
    """
    WIDTH: tl.constexpr = 4 * CHANNELS
    tile = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside_m = m < positions
    inside_n = n < WIDTH
    tokens = tokens_ptr + sample * positions * CHANNELS
    # Mean and variance chunk by chunk: each chunk's own, joined by Chan's update. No difference of large sums is taken.
    mean = tl.full((BLOCK_M,), 0.0, tl.float32)
    squares = tl.full((BLOCK_M,), 0.0, tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        inside_k = start + k < CHANNELS
        offsets = stream_offsets(m, start + k, positions, CHANNELS, CHANNELS_LAST)
        value = tl.load(tokens + offsets, mask=inside_m[:, None] & inside_k[None, :], other=0.0).to(tl.float32)
        count = tl.minimum(CHANNELS - start, BLOCK_K).to(tl.float32)
        total = start + count
        chunk_mean = tl.sum(value, 1) / count
        centred = tl.where(inside_k[None, :], value - chunk_mean[:, None], 0.0)
        step = chunk_mean - mean
        squares += tl.sum(centred * centred, 1) + step * step * (start * count / total)
        mean += step * (count / total)
    inverse = 1.0 / tl.sqrt(squares / CHANNELS + EPS)
    product = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        inside_k = start + k < CHANNELS
        offsets = stream_offsets(m, start + k, positions, CHANNELS, CHANNELS_LAST)
        value = tl.load(tokens + offsets, mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        # Zero behind C: of a row that hardly varies (0 - mean) · inverse is infinite, and NaN times a zero weight.
        normed = tl.where(inside_k[None, :], (value - mean[:, None]) * inverse[:, None], 0.0)
        weight = tl.load(
            weight_ptr + (start + k)[:, None] * WIDTH + n[None, :],
            mask=inside_k[:, None] & inside_n[None, :],
            other=0.0,
        )
        product = tl.dot(normed.to(weight.dtype), weight, product)
    product += tl.load(bias_ptr + n, mask=inside_n, other=0.0)[None, :]
    hidden = gelu(product).to(bias_ptr.dtype.element_ty)
    if hidden_ptr is not None:
        rows = hidden_ptr + sample * positions * WIDTH
        tl.store(rows + m[:, None] * WIDTH + n[None, :], hidden, mask=inside_m[:, None] & inside_n[None, :])
    if sums_ptr is not None:
        # Of the rounded values: those are what the second product reads or computes again.
        wide = tl.where(inside_m[:, None], hidden.to(tl.float32), 0.0)
        sums = sums_ptr + (sample * tl.num_programs(1) + tile) * WIDTH
        tl.store(sums + n, tl.sum(wide * wide, 0), mask=inside_n)


@triton.jit
def response_gain(
    sums_ptr, gamma_ptr, gain_ptr, tiles,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GRN's gain 1 + gamma · norm / (mean of the norms + eps) from the sums of squares of all tiles.

    Grid (N,). sums (N, tiles, 4C), gamma (4C,) and gain (N, 4C), all FP32. BLOCK_N is at least 4C, and BLOCK_M tiles
    are read at a time.
    """
    WIDTH: tl.constexpr = 4 * CHANNELS
    sample = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_M)
    inside_n = n < WIDTH
    sums = sums_ptr + sample * tiles * WIDTH
    squares = tl.full((BLOCK_N,), 0.0, tl.float32)
    for start in range(0, tiles, BLOCK_M):
        inside_t = start + t < tiles
        offsets = (start + t)[:, None] * WIDTH + n[None, :]
        squares += tl.sum(tl.load(sums + offsets, mask=inside_t[:, None] & inside_n[None, :], other=0.0), 0)
    norm = tl.sqrt(squares)
    share = norm / (tl.sum(norm, 0) / WIDTH + EPS)
    gamma = tl.load(gamma_ptr + n, mask=inside_n, other=0.0)
    tl.store(gain_ptr + sample * WIDTH + n, 1.0 + gamma * share, mask=inside_n)


@triton.jit
def gained_linear_residual(
    hidden_ptr, gain_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, positions,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Residual + (hidden · gain) @ weight + bias.

    Grid (⌈C / BLOCK_N⌉, ⌈positions / BLOCK_M⌉, N). gain (N, 4C) FP32, or None for a block without GRN.
    """
    WIDTH: tl.constexpr = 4 * CHANNELS
    sample = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside_m = m < positions
    inside_n = n < CHANNELS
    rows = hidden_ptr + sample * positions * WIDTH
    product = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        inside_k = start + k < WIDTH
        offsets = m[:, None] * WIDTH + (start + k)[None, :]
        hidden = tl.load(rows + offsets, mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + sample * WIDTH + start + k, mask=inside_k, other=0.0)
            hidden = (hidden * gain[None, :]).to(hidden.dtype)
        offsets = (start + k)[:, None] * CHANNELS + n[None, :]
        weight = tl.load(weight_ptr + offsets, mask=inside_k[:, None] & inside_n[None, :], other=0.0)
        product = tl.dot(hidden, weight, product)
    product += tl.load(bias_ptr + n, mask=inside_n, other=0.0)[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    stream = sample * positions * CHANNELS + stream_offsets(m, n, positions, CHANNELS, CHANNELS_LAST)
    product += tl.load(residual_ptr + stream, mask=inside, other=0.0)
    tl.store(out_ptr + stream, product, mask=inside)


@triton.jit
def gained_mlp_residual(
    tokens_ptr, weight1_ptr, bias1_ptr, gain_ptr, weight2_ptr, bias2_ptr, residual_ptr, out_ptr, positions,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Residual + (GELU(norm(tokens) @ weight1 + bias1) · gain) @ weight2 + bias2; the hidden tensor is stored nowhere.

    Grid (⌈positions / BLOCK_M⌉, N). A program holds whole rows, C in two parts of powers of two: channels 0 to FIRST
    and the REST, which may be none. BLOCK_K hidden channels are computed and used up at a time. gain may be None.
    """
    WIDTH: tl.constexpr = 4 * CHANNELS
    sample = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    inside_m = m < positions
    tokens = tokens_ptr + sample * positions * CHANNELS
    c = tl.arange(0, FIRST)
    inside_c = c < CHANNELS
    inside = inside_m[:, None] & inside_c[None, :]
    offsets = stream_offsets(m, c, positions, CHANNELS, CHANNELS_LAST)
    value = tl.load(tokens + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1)
    product = tl.full((BLOCK_M, FIRST), 0.0, tl.float32)
    if REST > 0:
        rest_c = FIRST + tl.arange(0, REST)
        inside_rest_c = rest_c < CHANNELS
        inside_rest = inside_m[:, None] & inside_rest_c[None, :]
        rest_offsets = stream_offsets(m, rest_c, positions, CHANNELS, CHANNELS_LAST)
        rest_value = tl.load(tokens + rest_offsets, mask=inside_rest, other=0.0).to(tl.float32)
        mean += tl.sum(rest_value, 1)
        rest_product = tl.full((BLOCK_M, REST), 0.0, tl.float32)
    # The whole row is at hand: the mean first, then the squares of what is centred.
    mean = (mean / CHANNELS)[:, None]
    value = tl.where(inside_c[None, :], value - mean, 0.0)
    squares = tl.sum(value * value, 1)
    if REST > 0:
        rest_value = tl.where(inside_rest_c[None, :], rest_value - mean, 0.0)
        squares += tl.sum(rest_value * rest_value, 1)
    inverse = (1.0 / tl.sqrt(squares / CHANNELS + EPS))[:, None]
    normed = (value * inverse).to(bias1_ptr.dtype.element_ty)
    if REST > 0:
        rest_normed = (rest_value * inverse).to(bias1_ptr.dtype.element_ty)
    for start in range(0, WIDTH, BLOCK_K):
        h = start + k
        inside_k = h < WIDTH
        mask = inside_c[:, None] & inside_k[None, :]
        weight = tl.load(weight1_ptr + c[:, None] * WIDTH + h[None, :], mask=mask, other=0.0)
        hidden = tl.dot(normed, weight)
        if REST > 0:
            mask = inside_rest_c[:, None] & inside_k[None, :]
            weight = tl.load(weight1_ptr + rest_c[:, None] * WIDTH + h[None, :], mask=mask, other=0.0)
            hidden = tl.dot(rest_normed, weight, hidden)
        hidden += tl.load(bias1_ptr + h, mask=inside_k, other=0.0)[None, :]
        # Rounded as the first kernel rounds it, so that gain and hidden tensor belong together.
        scaled = gelu(hidden).to(bias1_ptr.dtype.element_ty)
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + sample * WIDTH + h, mask=inside_k, other=0.0)
            scaled = (scaled * gain[None, :]).to(bias1_ptr.dtype.element_ty)
        mask = inside_k[:, None] & inside_c[None, :]
        weight = tl.load(weight2_ptr + h[:, None] * CHANNELS + c[None, :], mask=mask, other=0.0)
        product = tl.dot(scaled, weight, product)
        if REST > 0:
            mask = inside_k[:, None] & inside_rest_c[None, :]
            weight = tl.load(weight2_ptr + h[:, None] * CHANNELS + rest_c[None, :], mask=mask, other=0.0)
            rest_product = tl.dot(scaled, weight, rest_product)
    residual = residual_ptr + sample * positions * CHANNELS
    out = out_ptr + sample * positions * CHANNELS
    product += tl.load(bias2_ptr + c, mask=inside_c, other=0.0)[None, :]
    product += tl.load(residual + offsets, mask=inside, other=0.0)
    tl.store(out + offsets, product, mask=inside)
    if REST > 0:
        rest_product += tl.load(bias2_ptr + rest_c, mask=inside_rest_c, other=0.0)[None, :]
        rest_product += tl.load(residual + rest_offsets, mask=inside_rest, other=0.0)
        tl.store(out + rest_offsets, rest_product, mask=inside_rest)
