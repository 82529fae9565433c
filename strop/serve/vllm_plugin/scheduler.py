"""A scheduler for vLLM 0.32 that evicts by cost and computes holes only (AsymCache, arXiv 2606.02964).

vLLM looks blocks up until the first miss. Here every block of a request is looked up when it is admitted, and
its block table is laid out at once: cached blocks where there are some, new ones in the holes. A step of the
model stops where a hole ends, and before the next step the count of computed tokens jumps over the cached
blocks. Attention needs no change: a row still sees all slots before its own, and all of them are filled.

Left out: several holes of one request in one step, which takes a kernel and a model runner that know of rows
with gaps between them.
"""

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from strop.core.errors import StropError
from strop.serve.vllm_plugin.queue import EvictorQueue
from strop.serve.vllm_plugin.settings import Settings

Table = list[KVCacheBlock]
"""The blocks of a request in order of its tokens."""


class StropScheduler(Scheduler):
    """For `scheduler_cls`; where async scheduling is on, take `AsyncStropScheduler`."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._settings = Settings.of(self.vllm_config.additional_config)
        self._manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        self._pool = self.kv_cache_manager.block_pool
        self._laid_out: dict[str, tuple[Request, int, Table]] = {}
        """By request, of this step: tables, which hold their blocks, and how many come before a hole."""
        self._require_plain()
        self._order_blocks()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        for request in self.running:
            self._jump(request)
        output = super().schedule(throttle_prefills)
        for name, (request, prefix, table) in self._laid_out.items():
            if name in self._manager.num_cached_block:
                self._manager.num_cached_block[name] = prefix
                self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
            self._pool.free_blocks(reversed(table))
        self._laid_out.clear()
        return output

    def reset_prefix_cache(self, *args, **kwargs) -> bool:
        done = super().reset_prefix_cache(*args, **kwargs)
        if done:
            self._order_blocks()
        return done

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """The whole table in place of the prefix; how many tokens the prefix has stays as it is."""
        blocks, computed, *rest = super()._get_local_prefix_cache_hit(request)
        if self._settings.holes and self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            prefix = computed // self.block_size
            if table := self._lay_out(request, prefix):
                self._laid_out[request.request_id] = request, prefix, table
                blocks = self.kv_cache_manager.create_kv_cache_blocks((table,))
        return blocks, computed, *rest

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """At most as many tokens as there are before the next cached block."""
        new = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        _, _, table = self._laid_out.get(request.request_id, (None, 0, None))
        table = table or self._manager.req_to_blocks.get(request.request_id, ())
        for place in range(num_computed_tokens // self.block_size + 1, len(table)):
            if table[place].block_hash is not None:
                return min(new, place * self.block_size - num_computed_tokens)
        return new

    def _lay_out(self, request: Request, prefix: int) -> Table | None:
        """Every cached block of a request and new ones between them, held; None without a hole, or room.

        The last token is always computed, so its block is none of them.
        """
        full = (request.num_tokens - 1) // self.block_size
        found = [self._pool.get_cached_block(name, [0]) for name in request.block_hashes[:full]]
        while found and found[-1] is None:
            found.pop()
        if len(found) <= prefix:
            return None
        cached = [blocks[0] for blocks in found if blocks is not None]
        idle = sum(block.ref_cnt == 0 for block in cached)
        needed = -(-request.num_tokens // self.block_size) - len(cached)
        if needed + idle > self._pool.get_num_free_blocks():
            return None
        self._pool.touch(cached)
        new = iter(self._pool.get_new_blocks(len(found) - len(cached)))
        return [blocks[0] if blocks is not None else next(new) for blocks in found]

    def _jump(self, request: Request) -> None:
        """Take the cached blocks behind what was computed as computed."""
        table = self._manager.req_to_blocks[request.request_id]
        start, inside = divmod(request.num_computed_tokens, self.block_size)
        end = start
        while not inside and end < len(table) and table[end].block_hash is not None:
            end += 1
        if end == start:
            return
        self._manager.num_cached_block[request.request_id] = end
        request.num_computed_tokens = end * self.block_size
        self._count_hits(request, (end - start) * self.block_size)

    def _count_hits(self, request: Request, tokens: int) -> None:
        """Tell vLLM's metrics, which were told of the prefix already."""
        stats, own = self.kv_cache_manager.prefix_cache_stats, request.prefill_stats
        if request.num_preemptions:
            if stats:
                stats.preempted_hits += tokens
            return
        if stats:
            stats.hits += tokens
        if own:
            own.set(
                own.num_prompt_tokens, own.num_local_cached_tokens + tokens, own.num_external_cached_tokens
            )

    def _order_blocks(self) -> None:
        """Let a new evictor order the blocks, all of which are free."""
        blocks = [block for block in self._pool.blocks if not block.is_null]
        evictor = self._settings.make(len(blocks), self.block_size)
        self._pool.free_block_queue = EvictorQueue(blocks, evictor, self.block_size)

    def _require_plain(self) -> None:
        """Raise StropError for what was not made to go with this."""
        config, said = self.vllm_config, []
        if not self.cache_config.enable_prefix_caching:
            said.append("prefix caching is off")
        if len(self.kv_cache_config.kv_cache_groups) != 1 or type(self._manager) is not FullAttentionManager:
            said.append("the model has other layers than full attention")
        if self._manager.block_size != self.hash_block_size or self.block_size != self.hash_block_size:
            said.append("blocks are split over devices")
        if config.kv_transfer_config is not None:
            said.append("there is a KV connector")
        if self._settings.holes:
            if config.speculative_config is not None:
                said.append("there is a speculative config, which holes do not go with")
            if not self.scheduler_config.enable_chunked_prefill:
                said.append("chunked prefill is off, which holes need")
            if self.use_v2_model_runner:
                said.append("model runner V2 counts computed tokens itself: set VLLM_USE_V2_MODEL_RUNNER=0")
        if said:
            raise StropError(f"strop's scheduler cannot serve this: {'; '.join(said)}")


class AsyncStropScheduler(StropScheduler, AsyncScheduler):
    """The same for async scheduling."""
