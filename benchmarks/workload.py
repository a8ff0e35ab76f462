"""The synthetic workload of S-LoRA (Sheng et al. 2023): skewed popularity, Gamma arrivals, uniform lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WorkloadSpec:
    """What a trace is drawn from; two equal specs give the same trace.

    Attributes:
        adapters: How many are registered; each request names one of 0 to `adapters - 1`.
        rate: Requests a second.
        duration: Seconds; the trace has `rate * duration` requests.
        alpha: A request names an adapter of the most popular fraction x with probability x ** alpha: 1 is uniform.
        cv: Coefficient of variation of the times between arrivals: 1 is a Poisson process, more comes in bursts.
        input_range: Least and greatest number of prompt tokens.
        output_range: Least and greatest number of new tokens.
        vocabulary: Prompts are of tokens 3 to `vocabulary - 1`: the first three are special in the embedded base.
        rotation: The adapter that is the most popular; the others follow it in order.
        seed: Of all of it.
        prompts: Specs that differ in it alone give the same requests with other prompts. A server keeps what it has
            computed of a prompt, so each load on it needs prompts that no load before had.
    """

    adapters: int
    rate: float
    duration: float
    alpha: float = 0.6
    cv: float = 1.0
    input_range: tuple[int, int] = (8, 128)
    output_range: tuple[int, int] = (8, 64)
    vocabulary: int = 4096
    rotation: int = 0
    seed: int = 42
    prompts: int = 0


@dataclass(frozen=True)
class TimedRequest:
    """One request of a trace.

    Attributes:
        due: Seconds after the start of the trace at which it is sent.
        adapter: Index of the adapter.
        prompt: Token ids.
        new_tokens: How many to generate.
    """

    due: float
    adapter: int
    prompt: tuple[int, ...]
    new_tokens: int


def make_trace(spec: WorkloadSpec) -> list[TimedRequest]:
    """Draw a trace, in order of `due`.

    Each property has a random stream of its own, so that specs which differ in `adapters` alone give the same
    arrivals, lengths and prompts.
    """
    count = max(1, round(spec.rate * spec.duration))
    arrivals, popularity, lengths = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence(spec.seed).spawn(3)
    )
    contents = np.random.default_rng((spec.seed, spec.prompts))
    # A Gamma distribution with mean 1 / rate and standard deviation cv / rate.
    gaps = arrivals.gamma(1 / spec.cv**2, spec.cv**2 / spec.rate, count)
    # Inverse of the distribution function x ** alpha; `power(alpha)` draws the same, but not stream by stream.
    ranks = (popularity.random(count) ** (1 / spec.alpha) * spec.adapters).astype(int)
    inputs = lengths.integers(*spec.input_range, count, endpoint=True)
    outputs = lengths.integers(*spec.output_range, count, endpoint=True)
    return [
        TimedRequest(
            due=float(due),
            adapter=(int(rank) + spec.rotation) % spec.adapters,
            prompt=tuple(contents.integers(3, spec.vocabulary, length).tolist()),
            new_tokens=int(new_tokens),
        )
        for due, rank, length, new_tokens in zip(np.cumsum(gaps), ranks, inputs, outputs, strict=True)
    ]
