// Streams of the server: events as they come, and text that grows without making the page slow.

import { createParser } from "../vendor/eventsource-parser/index.js";
import { ApiError, isAbort, lost, open } from "./api.js";

/** The events of a response, as `{event, data}` with parsed JSON, until the stream ends or says [DONE]. */
export async function* events(method, url, options) {
  const response = await open(method, url, options);
  const waiting = [];
  const parser = createParser({ onEvent: (event) => waiting.push(event) });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let isEnded = false;
  try {
    while (true) {
      const { done, value } = await reader.read();
      // A proxy may have cut it.
      if (done) throw new TypeError("the stream has no end");
      parser.feed(value);
      for (const event of waiting.splice(0)) {
        if (event.data === "[DONE]") {
          isEnded = true;
          return;
        }
        const data = JSON.parse(event.data);
        // A failure after the first event has no status of its own.
        if (data.error && data.object === undefined) throw new ApiError(200, data, response.headers);
        yield { event: event.event ?? null, data };
      }
    }
  } catch (error) {
    if (error instanceof ApiError || isAbort(error)) throw error;
    throw lost(error, options.signal, "STREAM");
  } finally {
    if (!isEnded) await reader.cancel().catch(() => {});
  }
}

// A block this long is closed at the next line break: the browser lays out a block again whenever it grows.
const BLOCK = 2000;

/** Adds text to an element, once in an animation frame, however often text comes. */
export class TextSink {
  #element;
  #waiting = "";
  #frame = 0;
  #block = null;

  constructor(element) {
    this.#element = element;
  }

  /** Add text in the next frame. */
  push(text) {
    this.#waiting += text;
    if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.flush());
  }

  /** Add what waits now: a hidden tab draws no frames. */
  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#waiting === "") return;
    const box = this.#element;
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    let rest = this.#waiting;
    this.#waiting = "";
    while (rest !== "") {
      if (this.#block === null) {
        this.#block = document.createElement("div");
        this.#block.append("");
        box.append(this.#block);
      }
      const node = this.#block.lastChild;
      const end = node.length + rest.length > BLOCK ? rest.indexOf("\n", Math.max(0, BLOCK - node.length)) : -1;
      if (end < 0) {
        node.appendData(rest);
        rest = "";
      } else {
        node.appendData(rest.slice(0, end));
        rest = rest.slice(end + 1);
        this.#block = null;
      }
    }
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }

  /** Remove all text, and begin after `before`: what the text goes on from. */
  restart(before) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#waiting = "";
    this.#block = null;
    this.#element.replaceChildren();
    if (before === "") return;
    const shown = document.createElement("span");
    shown.className = "muted";
    shown.textContent = before;
    this.#block = document.createElement("div");
    this.#block.append(shown, "");
    this.#element.append(this.#block);
  }
}
