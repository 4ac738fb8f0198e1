"""From files and hub ids to batches of tokens, by random access. Knows tokenizers; no models and no diffusion.

`sources` finds rows, `formats` reads a row, `chat` makes tokens and answer masks of it, `tokenised` writes them to disk
once, `pipeline` splits and batches them. None of these modules uses jax, so that readers may run anywhere.
"""
