// One column of the playground: one model's answer to the prompt, as it comes.

import { isAbort } from "./api.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { figure, seconds } from "./format.js";
import { Button, ErrorNote } from "./ui.js";
import { TextSink, events } from "./stream.js";

const SHOWN_EVERY_MS = 200;
const NOTHING = { state: "idle", first: null, tokens: 0, rate: null, finish: null, version: null, error: null };
const STATES = { idle: "", waiting: "waiting", streaming: "writing", done: "done", stopped: "stopped", failed: "failed" };

/** What a lane asks the server for. `model` null is the base model. */
export function requestOf(model, base, mode, prompt, options) {
  if (mode === "chat") {
    const { max_new_tokens: most, ...others } = options;
    return ["/v1/chat/completions", {
      model: model ?? base, messages: [{ role: "user", content: prompt }], max_tokens: most, ...others,
      stream: true, stream_options: { include_usage: true },
    }];
  }
  return ["/v1/generate", { adapter: model, prompt, ...options, stream: true }];
}

/** The text, the number of tokens and the end that an event adds, in either of the two forms. */
export function read({ data }) {
  if (data.choices === undefined) {
    return {
      text: data.text, tokens: data.token_ids.length, finish: data.finish_reason, usage: data.usage,
      version: data.version && `v${data.version}`,
    };
  }
  const choice = data.choices[0];
  return {
    text: choice?.delta?.content ?? "", tokens: choice?.delta?.content ? 1 : 0, finish: choice?.finish_reason,
    usage: data.usage, version: data.system_fingerprint?.split("@")[1],
  };
}

/**
 * A lane. It runs when `run.number` changes, and `run.signal` stops all lanes. `onEnd` gets the number of a run that ended.
 */
export function Lane({ title, colour, run, request, onEnd }) {
  const [shown, setShown] = useState(NOTHING);
  const box = useRef(null);
  const sink = useRef(null);
  const stop = useRef(null);
  // A lane that is added after a run waits for the next one.
  const ran = useRef(run.number);
  useEffect(() => {
    sink.current = new TextSink(box.current);
  }, []);
  useEffect(() => {
    if (run.number === ran.current) return undefined;
    ran.current = run.number;
    const controller = new AbortController();
    stop.current = () => controller.abort();
    // All lanes may be stopped already, before this one has begun.
    const signal = AbortSignal.any([run.signal, controller.signal]);
    // What the model goes on with reads as one text with the prompt.
    sink.current.restart(request[1].prompt ?? "");
    follow(request, signal, sink.current, setShown).then(() => onEnd(run.number));
    return stop.current;
  }, [run.number]);
  const isBusy = shown.state === "waiting" || shown.state === "streaming";
  return html`<section class=${`lane ${shown.state}`} aria-label=${title} style=${{ "--lane": colour }}>
    <header>
      <h2><span class="dot"></span>${title}${shown.version && html` <small>${shown.version}</small>`}</h2>
      <span class="lane-state">${STATES[shown.state]}</span>
      ${isBusy && html`<${Button} icon="stop" kind="quiet" label=${`Stop ${title}`} onClick=${() => {
        stop.current();
        // The button goes now, and would take the focus with it.
        box.current.focus();
      }} />`}
    </header>
    <div ref=${box} class="lane-text" tabindex="0" role="log" aria-live="off" aria-label=${`Answer of ${title}`}></div>
    <${ErrorNote} error=${shown.error} />
    <dl class="lane-figures">
      <div><dt>First token</dt><dd>${shown.first === null ? "-" : seconds(shown.first)}</dd></div>
      <div><dt>Tokens/s</dt><dd>${shown.rate === null ? "-" : figure(Math.round(shown.rate * 10) / 10).replace(/\.?0+$/, "")}</dd></div>
      <div><dt>Tokens</dt><dd>${shown.tokens || "-"}</dd></div>
      <div><dt>End</dt><dd>${shown.finish ?? "-"}</dd></div>
    </dl>
  </section>`;
}

async function follow([url, body], signal, sink, show) {
  const began = performance.now();
  let figures = { ...NOTHING, state: "waiting" };
  let last = began;
  let drawn = 0;
  const set = (change) => {
    figures = { ...figures, ...change };
    show(figures);
  };
  set({});
  try {
    for await (const event of events("POST", url, { body, signal })) {
      const { text, tokens, finish, usage, version } = read(event);
      const now = performance.now();
      if (text) sink.push(text);
      figures.version ??= version ?? null;
      if (tokens > 0) {
        last = now;
        figures.first ??= (now - began) / 1000;
        figures.tokens += tokens;
        figures.state = "streaming";
      }
      if (usage) figures.tokens = usage.completion_tokens;
      if (finish) figures.finish = finish;
      figures.rate = rateOf(figures, began, last);
      if (now - drawn > SHOWN_EVERY_MS) {
        drawn = now;
        set({});
      }
    }
    sink.flush();
    set({ state: "done" });
  } catch (error) {
    sink.flush();
    set(isAbort(error) ? { state: "stopped", finish: "stopped" } : { state: "failed", error });
  }
}

/** Tokens a second after the first one: the wait before it has a figure of its own. */
function rateOf({ first, tokens }, began, last) {
  const span = (last - began) / 1000 - first;
  return first === null || tokens < 2 || span <= 0 ? null : (tokens - 1) / span;
}
