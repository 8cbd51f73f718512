"""tided inside vLLM 0.32: a general plugin, found by its entry point and inert unless TIDED_ENGINE is set (docs/engines-vllm.md).

    plugin    the entry point: patches three places of vLLM, none of which does anything yet
    core      the engine core's process: puts everything together around its busy loop
    boundary  where other threads' actions run: between two steps, also when nothing runs
    counts    the scheduler: acceptance, batch sizes, step times, and the schedule of drafted tokens
    worker    each worker's process: hooks around the runner and its draft, V1 and V2, and what the core asks of it
    capture   a step's rows, as every runner gives them, onto the tap
    weights   where a checkpoint's tensors lie in the loaded draft: reading back, replacing, restoring
    packing   the draft's linears on a processor: packed, and replaceable
    profile   T(n) and D(b), measured with requests of its own while nothing else runs
    control   what tided may ask of this engine
    optout    an ASGI middleware for the header x-tide-no-capture

Nothing here imports vLLM before vLLM itself has called the plugin.
"""
