"""The server: OpenAI's API over one engine that owns the device. Only this folder knows of HTTP and of requests.

`requests` says what is asked and what comes back; `engine` batches requests and runs them; `app` and `stream` speak
HTTP. How a model decodes stands in `sampling`, and nothing here changes it.
"""
