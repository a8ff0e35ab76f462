"""transformers' continuous batching made adapter-aware; this file and `processors.py` know its inner interfaces.

What is replaced, and why:

* the processor list (see there);
* the scheduler: it reports when a cancelled request has really left the batch, so that its adapter may be released;
* the output router: it calls back on the engine's thread; the stock one needs a live event loop per request, and a
  closed loop would kill the engine;
* the hashing of cached blocks: the stock one covers tokens alone, but another adapter's keys and values differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import scheduler as stock_scheduler
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus

from sera_kernels import NO_ADAPTER, AdapterBatch
from sera_serve.engine.attention import plan_sequences, use_varlen_attention
from sera_serve.engine.prefix_salts import PrefixSalts
from sera_serve.engine.processors import SequenceProcessors, options_of
from sera_serve.engine.sequences import SequenceListener, SequenceOptions, SequenceUpdate
from sera_serve.layers import AdapterContext

PAGE_SIZE = 32


class _Router(OutputRouter):  # type: ignore[misc]
    def __init__(self, listener: SequenceListener) -> None:
        super().__init__()
        self._listener = listener

    def deliver(self, output: GenerationOutput) -> None:
        self._listener.on_update(
            SequenceUpdate(output.request_id, output.generated_tokens, output.is_finished(), output.error)
        )

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class _Scheduler(stock_scheduler.FIFOScheduler):  # type: ignore[misc]
    """First come, first served, and tells the listener when a cancelled sequence is gone."""

    listener: SequenceListener | None = None

    def __init__(self, cache: PagedAttentionCache, *args: Any, **kwargs: Any) -> None:
        super().__init__(cache, *args, **kwargs)
        salts = PrefixSalts(PAGE_SIZE)
        search = cache.search_prefix_match

        def search_prefix_match(request_id: str, prompt: list[int]) -> int:
            state = self.waiting_requests[request_id]
            matched: int = search(request_id, salts.salted(prompt, options_of(state).prefix_key or request_id))
            if matched and self.listener is not None:
                self.listener.on_prefix(request_id, matched)
            return matched

        def mark_complete_blocks(state: RequestState, complete: dict[str, int]) -> None:
            if complete and state.status != RequestStatus.FINISHED:
                tokens = state.initial_tokens + state.generated_tokens
                salted = salts.salted(tokens, options_of(state).prefix_key or state.request_id)
                for name, blocks in complete.items():
                    cache.cache_allocators[name].mark_complete_blocks(state.request_id, salted, blocks)

        cache.search_prefix_match = search_prefix_match
        cache.mark_complete_blocks = mark_complete_blocks

    def clear_cancelled_requests(self) -> list[RequestState]:
        states: list[RequestState] = super().clear_cancelled_requests()
        if self.listener is not None:
            for state in states:
                state.status = RequestStatus.FINISHED
                self.listener.on_update(SequenceUpdate(state.request_id, state.generated_tokens, ended=True))
        return states


class _Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """Sets how many CPU threads the engine's own thread computes with; torch keeps that number by thread."""

    cpu_threads: int

    def _run_generation_loop(self) -> None:
        torch.set_num_threads(self.cpu_threads)
        super()._run_generation_loop()


class ContinuousBatch:
    """Runs one decoder over all submitted sequences, each with its own adapter, on a thread of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        context: AdapterContext,
        listener: SequenceListener,
        *,
        kv_cache_tokens: int,
        max_batch_tokens: int,
        max_sequences: int,
        cpu_threads: int,
    ) -> None:
        """Set up without starting.

        Args:
            model: A decoder with serving layers attached, for this object's use alone.
            context: The serving layers' context.
            listener: Told of every new token, every end, and what the prefix cache had.
            kv_cache_tokens: Size of the paged cache.
            max_batch_tokens: The most tokens of one forward pass; longer prompts are prefilled in chunks.
            max_sequences: The most sequences of one forward pass.
            cpu_threads: Threads of a forward pass on a CPU.
        """
        self._model = model
        self._context = context
        if model.device.type == "cpu":
            use_varlen_attention(model)
        # Schedulers are found by name when the thread starts: one name an engine, or two would share a listener.
        self._scheduler = f"sera-{id(self):x}"
        stock_scheduler.SCHEDULER_MAPPING[self._scheduler] = type("_Bound", (_Scheduler,), {"listener": listener})
        self._manager = _Manager(
            model,
            GenerationConfig(do_sample=False, eos_token_id=model.generation_config.eos_token_id),
            ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=max(1, -(-kv_cache_tokens // PAGE_SIZE)),
                max_batch_tokens=max_batch_tokens,
                max_requests_per_batch=max_sequences,
                allow_block_sharing=True,
                scheduler_type=self._scheduler,
                auto_switch_to_flash=model.device.type != "cpu",
                # Nothing that the layers do through Triton stands in a graph's way, but nobody has run it there yet.
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        self._manager.cpu_threads = cpu_threads
        self._manager.logit_processor = SequenceProcessors()
        self._manager.output_router = _Router(listener)
        model.register_forward_pre_hook(self._enter_pass, with_kwargs=True)
        model.register_forward_hook(self._exit_pass, always_call=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._manager.start()

    def stop(self) -> None:
        """Stop at once; sequences under way end with an error."""
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=30, hard_stop=True)
        stock_scheduler.SCHEDULER_MAPPING.pop(self._scheduler, None)

    def failure(self) -> str | None:
        """Why the engine's thread is not running, or None while it is."""
        status = self._manager.background_thread_status
        if status.fatal_error is not None:
            return f"the engine stopped on an error: {status.fatal_error}"
        if status.can_accept_new_requests() is not None:
            return "the engine is stopping"
        return None if self._manager.is_running() else "the engine is not running"

    def submit(
        self,
        request_id: str,
        tokens: list[int],
        max_new_tokens: int,
        end_tokens: list[int],
        options: SequenceOptions,
    ) -> None:
        """Queue a sequence; every outcome reaches the listener.

        Raises:
            RuntimeError: The engine is not accepting sequences.
        """
        accepted = self._manager.add_request(
            tokens,
            request_id=request_id,
            max_new_tokens=max_new_tokens,
            streaming=True,
            eos_token_id=end_tokens,
            options=options,
        )
        if accepted is None:
            raise RuntimeError("the engine did not accept the sequence")

    def cancel(self, request_id: str) -> None:
        """Take a sequence out of the batch; the listener hears when it is gone."""
        self._manager.cancel_request(request_id)

    def _enter_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        slots = kwargs["logits_processor_args"][SequenceProcessors.SLOT]
        on_cpu = slots.device.type == "cpu"
        if on_cpu:
            kwargs = plan_sequences(kwargs)
        if on_cpu and (slots == NO_ADAPTER).all():
            self._pass = self._context.run(None)
            self._pass.__enter__()
            return args, kwargs
        tokens = kwargs["input_ids"].shape[1]
        ends = kwargs["cu_seq_lens_q"][1:]
        position = torch.arange(tokens, device=slots.device, dtype=ends.dtype)
        sequence = torch.searchsorted(ends, position, right=True).clamp(max=len(slots) - 1)
        self._pass = self._context.run(AdapterBatch(slots[sequence]))
        self._pass.__enter__()
        return args, kwargs

    def _exit_pass(self, *unused: Any) -> None:
        self._pass.__exit__(None, None, None)
