"""tided inside SGLang: a plugin of its scheduler processes, loaded through the entry-point group `sglang.srt.plugins`.

`plugin` registers the hooks, `runtime` holds what one scheduler process has, `rows` puts hidden states onto the tap, `steps` sets and
counts drafted tokens, `weights` exchanges the draft, `profile` measures latency, `control` answers tided. Nothing here imports
SGLang before its plugin loader calls `plugin.register`.
"""
