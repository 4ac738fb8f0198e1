"""The server: OpenAI's API over one engine that owns the device. Only this package depends on HTTP and requests.

`requests` defines requests and results; `engine` batches requests and runs them; `app` and `stream` implement HTTP.
Decoding itself is in `sampling`; nothing here changes it.
"""
