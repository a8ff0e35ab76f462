"""Makes the pictures of docs/images: `python docs/screenshots.py --store demo-store` (`make serve` makes that store).

It serves a copy of the store with the real engine, sends it requests, and lets Chromium look at the console. The font
is Inter where it is installed, else the system's.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.commands.demo import DATA, EXAMPLES
from sera_serve.commands.serve import bound_socket
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app

CHROMIUM = "/usr/bin/chromium"
IMAGES = Path(__file__).parent / "images"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
# More tenants, so that a list looks like one: copies of the demo's adapters.
COPIES = {
    "demo/tickets": ["acme/desk", "acme/urgency", "globex/mail", "initech/triage"],
    "demo/pirate": ["acme/captain", "globex/tales", "hooli/stories"],
    "demo/chat": ["acme/helper", "globex/friend", "initech/kind"],
}
LOAD_S = 30


def fill(source: Path, target: Path) -> AdapterStore:
    """Copy a store, and publish the copies of its adapters."""
    shutil.copytree(source, target)
    store = AdapterStore(target)
    for adapter, names in COPIES.items():
        bundle = store.load(store.resolve(adapter).digest)
        for name in names:
            store.publish(bundle, name)
    return store


@contextmanager
def served(store: AdapterStore) -> Iterator[str]:
    """Serve a store with the embedded base. Yields the address."""
    settings = ServeSettings(store=store.root)
    app = build_app(ServingEngine(load_base("embedded"), store, settings), store, settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    with bound_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def load(url: str, streams: int = 3) -> Iterator[None]:
    """Keep a few clients busy, so that charts have something to show."""
    ending = threading.Event()
    names = [name for names in COPIES.values() for name in names]

    def ask(client: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as session:
            for turn in range(10**6):
                if ending.is_set():
                    return
                name = names[(client * 5 + turn) % len(names)]
                if name in COPIES["demo/tickets"]:
                    session.post("/v1/classify", json={"adapter": name, "inputs": [EXAMPLES["demo/tickets"]] * 4})
                else:
                    body = {"adapter": name, "prompt": EXAMPLES["demo/pirate"], "temperature": 1, "max_new_tokens": 40}
                    session.post("/v1/generate", json=body)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def pick(page: Page, *names: str) -> None:
    """Choose adapters in the picker of a view."""
    for name in names:
        page.get_by_role("combobox", name="Adapters").or_(page.get_by_role("combobox", name="Classifiers")).fill(name)
        page.get_by_role("option", name=name, exact=True).wait_for()
        page.keyboard.press("Enter")


def playground(page: Page) -> None:
    """Three answers to one prompt."""
    pick(page, "demo/pirate", "demo/chat")
    page.get_by_label("Prompt").fill(EXAMPLES["demo/pirate"])
    page.get_by_text("Sampling:").click()
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Most tokens").fill("44")
    page.get_by_text("Sampling:").click()
    page.get_by_role("button", name="Run").click()
    page.get_by_role("button", name="Run").wait_for(timeout=60_000)


def classify(page: Page) -> None:
    """One text through four classifiers."""
    pick(page, "demo/tickets", "acme/desk", "globex/mail")
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("54.").first.or_(page.locator(".bars").nth(2)).first.wait_for()


def live(page: Page) -> None:
    """The charts after a while."""
    page.wait_for_timeout(LOAD_S * 1000)


def train(url: str) -> str:
    """Begin a training job on the demo's rows. Returns its id."""
    with httpx.Client(base_url=url, timeout=60) as session:
        rows = (DATA / "pirate_train.jsonl").read_bytes()
        sent = session.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("stories.jsonl", rows)})
        body = {"model": "embedded", "training_file": sent.raise_for_status().json()["id"], "suffix": "tales"}
        body |= {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 8}}}}
        body |= {"adapter": {"tenant": "acme"}}
        return str(session.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])


def job(page: Page) -> None:
    """The curve of a job that is half done."""
    page.get_by_text(re.compile("4[0-9](\\.[0-9])?%|5[0-9](\\.[0-9])?%")).first.wait_for(timeout=240_000)


def shoot(
    browser: Browser, url: str, name: str, view: str, act: Callable[[Page], None], *, dark: bool, phone: bool
) -> None:
    """Take one picture."""
    context = browser.new_context(
        viewport=PHONE if phone else DESKTOP,
        color_scheme="dark" if dark else "light",
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
    )
    page = context.new_page()
    page.goto(f"{url}/console#/{view}")
    page.wait_for_load_state("networkidle")
    act(page)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)
    page.mouse.move(0, 0)
    # 256 colours are enough for a page, and a third of the bytes.
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)
    context.close()


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("demo-store"), help="a store with the demo tenants")
    source = parser.parse_args().store
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        store = fill(source, Path(folder) / "store")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with served(store) as url:
            shoot(browser, url, "console-playground", "playground", playground, dark=False, phone=False)
            shoot(browser, url, "console-adapters", "adapters", lambda page: None, dark=False, phone=False)
            shoot(browser, url, "console-phone", "classify", classify, dark=False, phone=True)
            shoot(browser, url, "console-training", f"training/{train(url)}", job, dark=False, phone=False)
            with load(url):
                shoot(browser, url, "console-live", "live", live, dark=True, phone=False)
        browser.close()


if __name__ == "__main__":
    main()
