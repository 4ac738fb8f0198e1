"""Grammars that constrain answers: definitions, the bytes of tokens, and matchers of which token may come next.

Everything here runs on the host and depends on no model. Token masks are packed bits, sent to the device.
"""
