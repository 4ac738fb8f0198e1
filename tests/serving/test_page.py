"""The page at `/` in a real browser (headless Chromium): a chat that denoises, an infilling of what is selected."""

import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from difflm_jax.serving.app import Server
from difflm_jax.serving.engine import Engine
from tests.serving.conftest import serving
from tests.test_browser import attributes, chromium, pixels  # noqa: F401  a fixture
from tests.test_browser import browse_url as browse

# Chats, then selects the first three characters of the answer and has them filled anew; reports what the page showed.
_PROBE = """
<img src="hold" hidden>
<script>
(async () => {
  const wait = async holds => { while (!holds()) await new Promise(done => setTimeout(done, 20)); };
  const seen = document.body.dataset;
  let most = 0, guesses = 0;
  new MutationObserver(() => {
    most = Math.max(most, document.querySelectorAll(".open").length);
    guesses = Math.max(guesses, document.querySelectorAll(".guess").length);
  }).observe(document.body, { childList: true, subtree: true });
  await wait(() => document.getElementById("model").value);
  document.getElementById("length").value = 24;
  document.getElementById("level").value = 25;
  document.getElementById("text").value = "<b>Hi</b>";
  document.getElementById("ask").requestSubmit();
  const answer = () => document.querySelector(".turn.assistant");
  await wait(() => answer() && answer().querySelector(".foot").textContent.includes("ended by"));
  seen.answer = answer().querySelector(".said").textContent;
  seen.foot = answer().querySelector(".foot").textContent;
  seen.asked = document.querySelector(".turn.user .said").textContent;
  seen.bold = document.querySelectorAll("main b").length;
  seen.open = most; seen.guesses = guesses;
  const text = answer().querySelector(".said").firstChild;
  getSelection().setBaseAndExtent(text, 4, text, 7);
  await wait(() => document.getElementById("refill").style.display === "block");
  const before = answer().querySelector(".foot").textContent;
  document.getElementById("refill").click();
  const foot = () => answer().querySelector(".foot").textContent;
  await wait(() => foot() !== before && foot().includes("ended by"));
  seen.refilled = answer().querySelector(".said").textContent;
  seen.refoot = answer().querySelector(".foot").textContent;
  seen.done = "yes";
})().catch(error => { document.body.dataset.error = error.message; }).finally(() => fetch("done"));
</script>
"""

# An EventSource can only GET: a test's own route asks for it, and hands on every byte.
_SOURCE = """<body><img src="hold"><script>
const seen = document.body.dataset, source = new EventSource("/events");
let text = "", count = 0;
source.onmessage = event => {
  count += 1;
  if (event.data === "[DONE]") {
    source.close();
    Object.assign(seen, { text, count, done: "yes" });
    fetch("done");
    return;
  }
  text += JSON.parse(event.data).choices[0].delta.content || "";
};
source.onerror = () => { source.close(); seen.error = "yes"; fetch("done"); };
</script></body>"""


class Probed(Server):
    """The server, with the probe in its page and an extra page with an EventSource.

    Chromium prints a page once it is loaded, and an image of these pages arrives when they have done what they do.
    """

    _done = threading.Event()

    def app(self) -> Starlette:
        app = super().app()
        app.router.routes[:0] = [
            Route("/probed", self._probed),
            Route("/source", lambda _: HTMLResponse(_SOURCE)),
            Route("/events", self._events),
            Route("/hold", self._hold),
            Route("/done", self._say_done),
        ]
        return app

    async def _probed(self, request: Request) -> Response:
        page = (await self._page(request)).body.decode()
        page = page.replace("img-src data:", "img-src data: 'self'")
        return HTMLResponse(page.replace("</body>", _PROBE + "</body>"))

    async def _hold(self, _: Request) -> Response:
        await run_in_threadpool(self._done.wait, 90)
        self._done.clear()
        return Response(media_type="image/png")

    async def _say_done(self, _: Request) -> Response:
        self._done.set()
        return Response()

    async def _events(self, request: Request) -> Response:
        async def copied():
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "stream": True}
            async with (
                httpx.AsyncClient(base_url=str(request.base_url), timeout=60) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as stream,
            ):
                async for part in stream.aiter_bytes():
                    yield part

        return StreamingResponse(copied(), media_type="text/event-stream")


@pytest.mark.slow
def test_the_page_chats_denoises_and_fills_anew(chromium, tiny_lm, tmp_path):  # noqa: F811
    """Proves in Chromium that the page streams a canvas, shows its figures, and refills a selection; with a picture."""
    with serving(Engine({"tiny": tiny_lm}), server=Probed) as client:
        dom = browse(chromium, f"{client.base_url}/probed", tmp_path, "--dump-dom")
        seen = attributes(dom)
        assert seen["data-done"] == "yes", dom[-2000:]
        expected = tiny_lm.generate([[{"role": "user", "content": "<b>Hi</b>"}]], max_new_tokens=24, steps=6)
        assert (
            seen["data-answer"] == expected.texts[0] and seen["data-asked"] == "<b>Hi</b>" and seen["data-bold"] == "0"
        )
        assert f"{len(expected.tokens[0])} tokens in {expected.steps[0]} passes" in seen["data-foot"]
        assert int(seen["data-open"]) + int(seen["data-guesses"]) > 6
        assert seen["data-refilled"][:4] == seen["data-answer"][:4] and "passes" in seen["data-refoot"]
        picture = tmp_path / "page.png"
        browse(chromium, f"{client.base_url}/probed", tmp_path, f"--screenshot={picture}")
        assert len(np.unique(pixels(picture).reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_an_event_source_reads_a_stream(chromium, tiny_lm, tmp_path):  # noqa: F811
    """Proves that a browser's own parser of server-sent events takes every event, and ends at [DONE] without error."""
    with serving(Engine({"tiny": tiny_lm}), server=Probed) as client:
        seen = attributes(browse(chromium, f"{client.base_url}/source", tmp_path, "--dump-dom"))
    expected = tiny_lm.generate([[{"role": "user", "content": "Hi"}]], max_new_tokens=12, steps=12)
    assert seen.get("data-done") == "yes" and "data-error" not in seen
    assert seen["data-text"] == expected.texts[0] and int(seen["data-count"]) >= 3


def test_the_page_needs_nothing_from_elsewhere():
    page = (Path(__file__).parents[2] / "difflm_jax/serving/web/page.html").read_text("utf-8")
    assert "default-src 'none'" in page and "connect-src 'self'" in page
    assert not [word for word in ("http:", "https:", "//cdn", "innerHTML", "@import", "document.write") if word in page]
