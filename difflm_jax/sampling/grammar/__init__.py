"""Grammars that answers keep to: what a grammar is, tokens as bytes, and matchers that say which token may come next.

Everything here runs on the host and knows neither models nor canvases; masks are bits that go to the device.
"""
