"""The lane of the page: `make page-test`. What needs a browser is skipped where there is none, and counted."""

import os
import shutil
from pathlib import Path

import pytest

PICTURES = Path(__file__).parents[2] / "build" / "page"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'fastdiff-engine[page]'")
    known = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in known if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("the page's tests need Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page written by ``fastdiff.page``; fails for errors on its console, and for anything it loads."""
    from fastdiff import page

    contexts, complaints = [], []

    def open_page(model=None, *, size="desktop", **options):
        path = tmp_path / f"page{len(contexts)}.html"
        page.save(path, model)
        width, height = SIZES[size]
        options |= {"has_touch": True, "is_mobile": True} if size == "phone" else {}
        options = {"reduced_motion": "reduce", **options}
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        own = ("file:", "data:", "blob:")  # of blobs are the workers, which the page makes of its own text
        shown.on("request", lambda request: request.url.startswith(own) or complaints.append(request.url))
        shown.goto(path.as_uri())
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def picture():
    """Keeps a picture of a page in build/page, to be looked at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    return lambda shown, name: shown.screenshot(path=PICTURES / f"{name}.png", full_page=True)
