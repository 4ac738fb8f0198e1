#!/usr/bin/env bash
# openai: a stream that ends without [DONE], and a server-sent event named `error`, end the loop of a client quietly:
# nothing is raised.
# Seen: one chunk each, no exception.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
cd "$folder"
env/bin/python - <<'END'
import http.server, importlib.metadata, json, threading
from openai import OpenAI

chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m",
         "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]}
ENDINGS = {"cut": "", "event": 'event: error\ndata: {"message": "out of memory"}\n\n'}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        body = f"data: {json.dumps(chunk)}\n\n" + ENDINGS[self.path.split("/")[1]]
        self.wfile.write(body.encode())

    def log_message(self, *arguments):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
found = {}
for ending in ENDINGS:
    client = OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/{ending}", api_key="none", max_retries=0)
    try:
        stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], stream=True)
        found[ending] = [bool(part.choices) for part in stream]
    except Exception as error:
        found[ending] = f"{type(error).__name__}: {error}"
print("openai", importlib.metadata.version("openai"))
print("chunks (with choices?) by ending:", found)
assert found["cut"] == [True] and isinstance(found["event"], list), "this has changed"
END
