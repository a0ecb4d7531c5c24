"""
The kernels of [`triton_divergence_kernel`].

One program per row reads the logits of both sides three times: for the normalisers, for the value (unless that is a
closed form of what the first pass found), and for the gradient. The passes go to and fro, since what was read last is
still in the cache. Each lane of a program keeps sums of its own until the end of a pass, relative to its own running
maximum. Logits are taken relative to that of the sampled token: a log-probability is then the difference of two small
numbers, where the logits themselves may be large.
"""

import triton
import triton.language as tl


_LOWEST = tl.constexpr(-3.0e38)
# Neither their size nor where they start may be a reason to compile anew
_ROW_ARGUMENTS = [
    "token_ptr", "factor_ptr", "likelihood_ptr", "valid_ptr", "out_ptr", "out_stride", "normaliser_ptr",
    "normaliser_stride", "whole_ptr", "bucket_ptr", "log_outside_ptr",
]  # fmt: skip


@triton.jit
def _logits(row_ptr, bias_ptr, at, inside, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    products = tl.load(row_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logits = products
    if HAS_BIAS:
        logits += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logits *= scale
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(logits) / softcap)
        capped = softcap * (1.0 - decay) / (1.0 + decay)
        logits = tl.where(logits < 0.0, -capped, capped)
        logits = tl.where(products == float("-inf"), products, logits)  # put aside with a support
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _reference(row_ptr, bias_ptr, token, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    logit = _logits(row_ptr, bias_ptr, token, token >= 0, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    return tl.where(tl.abs(logit) < 1.0e30, logit, 0.0)


@triton.jit
def _product(p, x):
    # 0 wherever p is, even if x is infinite or undefined there
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def _weigh(z, maximum):
    # What a new logit makes of a lane's running maximum: the factors of the sum so far and of the new term
    above = z > maximum
    exp = tl.exp(-tl.abs(z - maximum))
    return tl.where(above, z, maximum), tl.where(above, exp, 1.0), tl.where(above, 1.0, exp)


@triton.jit
def _merge(maximum):
    # The same for the lanes of a program
    highest = tl.max(maximum, axis=0)
    return highest, tl.exp(maximum - highest)


@triton.jit
def _bounded(log_s, log_t, log_low, log_high, RATIO_LOW: tl.constexpr, RATIO_HIGH: tl.constexpr):
    # See `bounded`. A comparison with NaN is false, so that one stays
    if RATIO_LOW:
        log_t = tl.where(log_t < log_s + log_low, log_s + log_low, log_t)
    if RATIO_HIGH:
        log_t = tl.where(log_t > log_s + log_high, log_s + log_high, log_t)
    return log_t


@triton.jit
def _entries(log_s, log_t, p_s, p_t, beta, MODE: tl.constexpr):
    # Entries of the divergence and their slopes, see `pointwise_divergence`
    if MODE == 0:
        entries = _product(p_t, log_t - log_s)
        slopes = -p_t
    elif MODE == 1:
        entries = _product(p_s, log_s - log_t)
        slopes = entries + p_s
    else:
        log_m = tl.log(beta * p_t + (1.0 - beta) * p_s)
        slopes = (1.0 - beta) * _product(p_s, log_s - log_m)
        entries = beta * _product(p_t, log_t - log_m) + slopes
    return entries, slopes


@triton.jit(do_not_specialize=_ROW_ARGUMENTS, do_not_specialize_on_alignment=_ROW_ARGUMENTS)
def full_kernel(
    student_ptr, teacher_ptr, grad_ptr, student_bias_ptr, teacher_bias_ptr,
    token_ptr, factor_ptr, likelihood_ptr, valid_ptr, out_ptr, out_stride,
    student_stride, teacher_stride, grad_stride, n_cols,
    student_scale, student_softcap, teacher_scale, teacher_softcap, inverse_temperature, beta, clip,
    log_low, log_high,
    STUDENT_BIAS: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    MODE: tl.constexpr, CLIP: tl.constexpr, RATIO_LOW: tl.constexpr, RATIO_HIGH: tl.constexpr, POINTWISE: tl.constexpr,
    RATIO_IS_DATA: tl.constexpr,
    LIKELIHOOD: tl.constexpr, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Python's floats would be fp64 under the interpreter
    student_scale, student_softcap = tl.cast(student_scale, tl.float32), tl.cast(student_softcap, tl.float32)
    teacher_scale, teacher_softcap = tl.cast(teacher_scale, tl.float32), tl.cast(teacher_softcap, tl.float32)
    inverse_temperature, beta, clip = (
        tl.cast(inverse_temperature, tl.float32),
        tl.cast(beta, tl.float32),
        tl.cast(clip, tl.float32),
    )
    log_low, log_high = tl.cast(log_low, tl.float32), tl.cast(log_high, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    grad_ptr += row * grad_stride
    token = tl.load(token_ptr + row)
    ref_s = _reference(
        student_ptr, student_bias_ptr, token, student_scale, student_softcap, STUDENT_BIAS, STUDENT_SOFTCAP
    )
    ref_t = _reference(
        teacher_ptr, teacher_bias_ptr, token, teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_SOFTCAP
    )
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)

    # Normalisers, entropies, and the gap whose mean is a KL without a clip
    max_s, max_t = zeros + _LOWEST, zeros + _LOWEST
    sum_s, mean_s, sum_t, mean_t, gap = zeros, zeros, zeros, zeros, zeros
    for start in range(0, n_cols, BLOCK):
        at = start + lanes
        inside = at < n_cols
        z_s = _logits(
            student_ptr, student_bias_ptr, at, inside, student_scale, student_softcap, STUDENT_BIAS, STUDENT_SOFTCAP
        )
        z_t = _logits(
            teacher_ptr, teacher_bias_ptr, at, inside, teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_SOFTCAP
        )
        z_s = (z_s - ref_s) * inverse_temperature
        z_t = (z_t - ref_t) * inverse_temperature
        max_s, keep_s, add_s = _weigh(z_s, max_s)
        max_t, keep_t, add_t = _weigh(z_t, max_t)
        sum_s = sum_s * keep_s + add_s
        sum_t = sum_t * keep_t + add_t
        mean_s = mean_s * keep_s + _product(add_s, z_s)
        mean_t = mean_t * keep_t + _product(add_t, z_t)
        if not POINTWISE:
            if MODE == 0:
                gap = _product(keep_t, gap) + _product(add_t, z_t - z_s)
            if MODE == 1:
                gap = _product(keep_s, gap) + _product(add_s, z_s - z_t)
    highest_s, share_s = _merge(max_s)
    highest_t, share_t = _merge(max_t)
    total_s = tl.sum(sum_s * share_s, axis=0)
    total_t = tl.sum(sum_t * share_t, axis=0)
    lse_s = highest_s + tl.log(total_s)
    lse_t = highest_t + tl.log(total_t)
    entropy_s = lse_s - tl.sum(mean_s * share_s, axis=0) / total_s
    entropy_t = lse_t - tl.sum(mean_t * share_t, axis=0) / total_t

    clipped, clipped_mass = 0.0, 0.0
    if MODE == 0 and not POINTWISE:
        value = tl.sum(_product(share_t, gap), axis=0) / total_t - lse_t + lse_s
        slope_sum = value * 0.0 - 1.0
    elif MODE == 1 and not POINTWISE:
        value = tl.sum(_product(share_s, gap), axis=0) / total_s - lse_s + lse_t
        slope_sum = value + 1.0
    else:
        values, slope_sums, counts, masses = zeros, zeros, zeros, zeros
        num_blocks = tl.cdiv(n_cols, BLOCK)
        for index in range(num_blocks):
            at = (num_blocks - 1 - index) * BLOCK + lanes
            inside = at < n_cols
            z_s = _logits(
                student_ptr, student_bias_ptr, at, inside, student_scale, student_softcap, STUDENT_BIAS,
                STUDENT_SOFTCAP,
            )  # fmt: skip
            z_t = _logits(
                teacher_ptr, teacher_bias_ptr, at, inside, teacher_scale, teacher_softcap, TEACHER_BIAS,
                TEACHER_SOFTCAP,
            )  # fmt: skip
            log_s = (z_s - ref_s) * inverse_temperature - lse_s
            free_t = (z_t - ref_t) * inverse_temperature - lse_t
            log_t = _bounded(log_s, free_t, log_low, log_high, RATIO_LOW, RATIO_HIGH)
            entries, slopes = _entries(log_s, log_t, tl.exp(log_s), tl.exp(log_t), beta, MODE)
            if RATIO_IS_DATA:
                slopes = tl.where(log_t == free_t, slopes, entries)
            if CLIP:
                above = inside & (entries > clip)
                counts += above.to(tl.float32)
                masses += tl.where(above, entries - clip, 0.0)
                entries = tl.where(above, clip, entries)
                slopes = tl.where(above, 0.0, slopes)
            values += tl.where(inside, entries, 0.0)
            slope_sums += tl.where(inside, slopes, 0.0)
        value = tl.sum(values, axis=0)
        slope_sum = tl.sum(slope_sums, axis=0)
        if CLIP:
            clipped = tl.where(tl.sum(counts, axis=0) > 0.0, 1.0, 0.0)
            clipped_mass = tl.sum(masses, axis=0)

    log_prob_s = (
        _logits(student_ptr, student_bias_ptr, token, token >= 0, student_scale, student_softcap, STUDENT_BIAS,
                STUDENT_SOFTCAP) - ref_s
    ) * inverse_temperature - lse_s  # fmt: skip
    log_prob_t = (
        _logits(teacher_ptr, teacher_bias_ptr, token, token >= 0, teacher_scale, teacher_softcap, TEACHER_BIAS,
                TEACHER_SOFTCAP) - ref_t
    ) * inverse_temperature - lse_t  # fmt: skip
    # A comparison with NaN is false
    finite = (tl.load(valid_ptr + row) != 0) & (tl.abs(value) < float("inf")) & (tl.abs(slope_sum) < float("inf"))
    factor = tl.load(factor_ptr + row)
    pull = 0.0
    if LIKELIHOOD:
        pull = tl.load(likelihood_ptr + row)
        finite = finite & ((tl.abs(log_prob_s) < float("inf")) | (pull == 0.0))
    tl.store(out_ptr + row, tl.where(finite, value, 0.0))
    tl.store(out_ptr + row + 1 * out_stride, entropy_s)
    tl.store(out_ptr + row + 2 * out_stride, entropy_t)
    tl.store(out_ptr + row + 3 * out_stride, log_prob_s)
    tl.store(out_ptr + row + 4 * out_stride, log_prob_t)
    tl.store(out_ptr + row + 5 * out_stride, tl.where(finite, clipped, 0.0))
    tl.store(out_ptr + row + 6 * out_stride, tl.where(finite, clipped_mass, 0.0))
    tl.store(out_ptr + row + 7 * out_stride, tl.where(finite, 1.0, 0.0))

    if NEEDS_GRAD:
        for start in range(0, n_cols, BLOCK):
            at = start + lanes
            inside = at < n_cols
            z_s = _logits(
                student_ptr, student_bias_ptr, at, inside, student_scale, student_softcap, STUDENT_BIAS,
                STUDENT_SOFTCAP,
            )  # fmt: skip
            z_t = _logits(
                teacher_ptr, teacher_bias_ptr, at, inside, teacher_scale, teacher_softcap, TEACHER_BIAS,
                TEACHER_SOFTCAP,
            )  # fmt: skip
            log_s = (z_s - ref_s) * inverse_temperature - lse_s
            free_t = (z_t - ref_t) * inverse_temperature - lse_t
            log_t = _bounded(log_s, free_t, log_low, log_high, RATIO_LOW, RATIO_HIGH)
            p_s = tl.exp(log_s)
            entries, slopes = _entries(log_s, log_t, p_s, tl.exp(log_t), beta, MODE)
            if RATIO_IS_DATA:
                slopes = tl.where(log_t == free_t, slopes, entries)
            if CLIP:
                slopes = tl.where(entries > clip, 0.0, slopes)
            grad = (slopes - p_s * slope_sum) * factor
            if LIKELIHOOD:
                grad += (p_s - tl.where(at == token, 1.0, 0.0)) * pull
            grad *= student_scale
            if STUDENT_SOFTCAP:
                grad *= 1.0 - (z_s / student_softcap) * (z_s / student_softcap)
            grad = tl.where(finite, grad, 0.0)
            # The gradient may lie over logits that other threads of this program are about to read
            tl.debug_barrier()
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ROW_ARGUMENTS, do_not_specialize_on_alignment=_ROW_ARGUMENTS)
def normaliser_kernel(
    logit_ptr, bias_ptr, token_ptr, maxima_ptr, out_ptr, out_stride, logit_stride, maxima_stride, n_cols,
    scale, softcap, inverse_temperature,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, MAXIMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The log of a softmax's normaliser, the reference it is relative to, the entropy and the token's log-probability
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    logit_ptr += row * logit_stride
    maxima_ptr += row * maxima_stride
    token = tl.load(token_ptr + row)
    ref = _reference(logit_ptr, bias_ptr, token, scale, softcap, BIAS, SOFTCAP)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    maximum = zeros + _LOWEST
    total, mean = zeros, zeros
    for start in range(0, n_cols, BLOCK):
        at = start + lanes
        inside = at < n_cols
        z = (_logits(logit_ptr, bias_ptr, at, inside, scale, softcap, BIAS, SOFTCAP) - ref) * inverse_temperature
        if MAXIMA:
            chunks = start // CHUNK + tl.arange(0, BLOCK // CHUNK)
            tl.store(
                maxima_ptr + chunks, tl.max(tl.reshape(z, [BLOCK // CHUNK, CHUNK]), axis=1),
                mask=chunks * CHUNK < n_cols,
            )  # fmt: skip
        maximum, keep, add = _weigh(z, maximum)
        total = total * keep + add
        mean = mean * keep + _product(add, z)
    highest, share = _merge(maximum)
    sum_ = tl.sum(total * share, axis=0)
    lse = highest + tl.log(sum_)
    logit = _logits(logit_ptr, bias_ptr, token, token >= 0, scale, softcap, BIAS, SOFTCAP)
    tl.store(out_ptr + row, lse)
    tl.store(out_ptr + row + 1 * out_stride, ref)
    tl.store(out_ptr + row + 2 * out_stride, lse - tl.sum(mean * share, axis=0) / sum_)
    tl.store(out_ptr + row + 3 * out_stride, (logit - ref) * inverse_temperature - lse)


@triton.jit(do_not_specialize=_ROW_ARGUMENTS, do_not_specialize_on_alignment=_ROW_ARGUMENTS)
def outside_kernel(
    logit_ptr, bias_ptr, normaliser_ptr, out_ptr, normaliser_stride, logit_stride, n_cols,
    scale, softcap, inverse_temperature,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The log of the probability of all tokens whose logit is not −∞
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    logit_ptr += row * logit_stride
    lse = tl.load(normaliser_ptr + row)
    ref = tl.load(normaliser_ptr + row + normaliser_stride)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    maximum, total = zeros + _LOWEST, zeros
    num_blocks = tl.cdiv(n_cols, BLOCK)
    for index in range(num_blocks):
        at = (num_blocks - 1 - index) * BLOCK + lanes
        z = (_logits(logit_ptr, bias_ptr, at, at < n_cols, scale, softcap, BIAS, SOFTCAP) - ref) * inverse_temperature
        maximum, keep, add = _weigh(z, maximum)
        total = total * keep + add
    highest, share = _merge(maximum)
    sum_ = tl.sum(total * share, axis=0)
    tl.store(out_ptr + row, tl.where(sum_ == 0.0, float("-inf"), highest + tl.log(sum_) - lse))


@triton.jit(do_not_specialize=_ROW_ARGUMENTS, do_not_specialize_on_alignment=_ROW_ARGUMENTS)
def softmax_grad_kernel(
    logit_ptr, grad_ptr, bias_ptr, normaliser_ptr, whole_ptr, bucket_ptr, log_outside_ptr, valid_ptr,
    normaliser_stride, logit_stride, grad_stride, n_cols, scale, softcap, inverse_temperature,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Multiples of the softmax and of the softmax over what is not −∞, with respect to the products
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    logit_ptr += row * logit_stride
    grad_ptr += row * grad_stride
    lse = tl.load(normaliser_ptr + row)
    ref = tl.load(normaliser_ptr + row + normaliser_stride)
    whole = tl.load(whole_ptr + row)
    bucket = tl.load(bucket_ptr + row)
    log_outside = tl.load(log_outside_ptr + row)
    finite = tl.load(valid_ptr + row) != 0
    lanes = tl.arange(0, BLOCK)
    for start in range(0, n_cols, BLOCK):
        at = start + lanes
        inside = at < n_cols
        z = _logits(logit_ptr, bias_ptr, at, inside, scale, softcap, BIAS, SOFTCAP)
        log_p = (z - ref) * inverse_temperature - lse
        share = tl.where(log_outside == float("-inf"), 0.0, tl.exp(log_p - log_outside))
        grad = (tl.exp(log_p) * whole + share * bucket) * scale
        if SOFTCAP:
            slope = 1.0 - (z / softcap) * (z / softcap)
            grad *= tl.where(z == float("-inf"), 0.0, slope)
        grad = tl.where(finite, grad, 0.0)
        tl.debug_barrier()  # as above
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(ptr, out_ptr, factor_ptr, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if (not IN_PLACE) or factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        product = tl.load(ptr + at, mask=at < size) * factor
        tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=at < size)
