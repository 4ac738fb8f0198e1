"""From files and hub ids to batches of tokens, by random access. Knows tokenizers; no models and no diffusion.

`sources` finds rows (`splits`: which files; `readers` and `tables`: what they hold). `formats` reads a row, `templates`
renders it, `chat` turns it into tokens with an answer mask, and `tokenised` writes them to disk once. `batches` splits
and batches them. None of these modules uses jax, so that readers may run anywhere.
"""
