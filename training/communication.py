"""Communication volume of a step, and the scaling efficiency it predicts (not measured).

With G ranks, weights and gradients of N parameters in b bytes each (2 in bf16), A micro-batches a step and r = (G - 1) / G, what a rank
sends in a step, over rings (reduce-scatter and all-gather each send r of the data, an all-reduce both):

    ZeRO 0      2 r b N                  gradients all-reduced once
    ZeRO 1      r b N + r b N            gradients reduced once, weights gathered once
    ZeRO 2      A r b N + r b N          gradients are kept cut, so every micro-batch reduces them
    ZeRO 3      A r b N + 2 A r b N      and every micro-batch gathers the weights, for the forward and for the backward pass

A sharpness-aware step does so in each of its passes. A step then takes between

    max(C, V / B)   everything sent behind the computing            and        C + V / B   nothing,

with C = FLOPs of the rank's tokens over the speed that one GPU sustains alone, V the bytes above, and B the bandwidth of a rank's
slowest link: inside a host that of NVLink, else the network's. (arXiv 1910.02054, section 7, counts the same volumes.)
"""

from __future__ import annotations

from dataclasses import dataclass

NVLINK = 450e9  # bytes a second and direction, H100 and H200 SXM
NETWORK = 50e9  # a 400 Gbit/s port for each GPU
GPUS_OF_A_HOST = 8


def bytes_sent(stage: int, parameters: int, ranks: int, accumulation: int, width: int = 2, passes: float = 1.0) -> float:
    """Bytes that a rank sends in a step; `width` bytes a number, `passes` of a sharpness-aware step."""
    once = (ranks - 1) / ranks * width * parameters
    times = {0: 2.0, 1: 2.0, 2: accumulation * passes + 1, 3: 3 * accumulation * passes}[stage]
    if stage < 2:
        times += (passes - 1) * (2 if stage == 0 else 1)
    return times * once


@dataclass(frozen=True)
class Scaling:
    """Predicted tokens/s of all ranks and parallel efficiency, with communication fully overlapped (hidden) and not at all (exposed)."""

    ranks: int
    sent: float
    hidden: float
    exposed: float
    share_hidden: float
    share_exposed: float


def scaling(
    stage: int,
    parameters: int,
    flops_per_token: float,
    tokens_of_a_rank: int,
    accumulation: int,
    ranks: int,
    sustained: float,
    passes: float = 1.0,
) -> Scaling:
    """Of `ranks` GPUs that each sustain `sustained` FLOP/s alone, with `tokens_of_a_rank` tokens a step and rank (weak scaling), which a
    sharpness-aware step goes over `passes` times and counts once."""
    computing = passes * tokens_of_a_rank * flops_per_token / sustained
    sent = bytes_sent(stage, parameters, ranks, accumulation, passes=passes)
    sending = sent / (NVLINK if ranks <= GPUS_OF_A_HOST else NETWORK)
    shares = [computing / max(computing, sending), computing / (computing + sending)]
    alone = ranks * tokens_of_a_rank / computing
    return Scaling(ranks, sent, *(alone * share for share in shares), *shares)
