"""From files and hub ids to batches of tokens, with random access. Depends on tokenizers, not on models or diffusion.

`sources` finds rows: `splits` picks the files, `readers` and `tables` read them. `formats` parses a row, `templates`
renders it, `chat` turns it into tokens with an answer mask, and `tokenised` writes the tokens to disk once. `batches`
splits and batches them. None of these modules imports jax, so readers can run anywhere.
"""
