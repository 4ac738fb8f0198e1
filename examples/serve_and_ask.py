"""Serves a converted model, asks it over HTTP as any client of OpenAI's API would, and watches the canvas fill.

python examples/serve_and_ask.py MODEL [ADAPTER]  # after the quickstart: the .gguf file, runs/quickstart/sft_model
"""

import json
import subprocess
import sys
import urllib.request

command = [sys.executable, "-m", "difflm_jax.serve", f"--model={sys.argv[1]}", "--dtype=auto", "--port=0"]
command += [f"--adapter=mine={sys.argv[2]}"] if len(sys.argv) > 2 else []

with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    try:
        url = next((line.split()[-1] for line in server.stderr if line.startswith("serving ")), None)
        if url is None:
            sys.exit("the server did not start")
        body = {
            "messages": [{"role": "user", "content": "What is the capital of Italy?"}],
            "max_tokens": 16,
            "stream": True,
            "diffusion": {"threshold": 0.9, "drafts": True},
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        answer, passes = "", 0
        with urllib.request.urlopen(request) as stream:
            for line in stream:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                for choice in chunk["choices"]:
                    answer += choice["delta"].get("content") or ""
                seen = chunk.get("diffusion") or {}
                passes = seen.get("passes", passes)
                if "draft" in seen:
                    print(f"pass {passes}: {''.join(piece or '░' for piece in seen['draft']['pieces'])!r}")
        print(f"{answer!r} in {passes} passes")
    finally:
        server.terminate()
