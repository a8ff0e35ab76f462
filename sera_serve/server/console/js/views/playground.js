// One prompt through the base model and several adapters, side by side.

import { html, useEffect, useMemo, useRef, useState } from "../html.js";
import { numberOr } from "../format.js";
import { AdapterPicker, useChosen } from "../picker.js";
import { Lane, requestOf } from "../lane.js";
import { Button, Check, Field, Heading, onCtrlEnter, Segments, TextField } from "../ui.js";

// A browser opens six connections to one server. One is left for the rest of the page.
const MOST_LANES = 5;
const COLOURS = ["var(--lane-1)", "var(--lane-2)", "var(--lane-3)", "var(--lane-4)", "var(--lane-5)"];
const EXAMPLE = "Once upon a time";
const MODES = [["text", "Continue"], ["chat", "Chat"]];
const DEFAULTS = { max_new_tokens: "128", temperature: "0.8", top_p: "1", top_k: "0", seed: "" };

// What a person typed outlives a look at another view.
const kept = { prompt: EXAMPLE, adapters: [], withBase: true, mode: "text", options: DEFAULTS };

export default function Playground({ me }) {
  const [prompt, setPrompt] = useState(kept.prompt);
  const [adapters, setAdapters] = useChosen("playground", kept, () => MOST_LANES - (kept.withBase ? 1 : 0));
  const [withBase, setBase] = useState(kept.withBase);
  const [mode, setMode] = useState(kept.mode);
  const [options, setOptions] = useState(kept.options);
  const [run, setRun] = useState({ number: 0, signal: null });
  const [busy, setBusy] = useState(0);
  const stopper = useRef(null);
  Object.assign(kept, { prompt, adapters, withBase, mode, options });
  useEffect(() => () => stopper.current?.abort(), []);
  const lanes = [...(withBase ? [null] : []), ...adapters];
  const canRun = prompt.trim() !== "" && lanes.length > 0;
  // The request that runs is of the moment when it began, whatever is typed then.
  const asked = useMemo(
    () => new Map(lanes.map((model) => [model, requestOf(model, me.base.name, mode, prompt, numbers(options))])),
    [run.number],
  );
  const start = () => {
    if (!canRun) return;
    stopper.current?.abort();
    stopper.current = new AbortController();
    setBusy(lanes.length);
    setRun({ number: run.number + 1, signal: stopper.current.signal });
  };
  const ended = useRef(null);
  ended.current = (number) => number === run.number && setBusy((left) => Math.max(0, left - 1));
  useEffect(() => {
    // Wherever the focus is: a button that was pressed may be gone.
    const onEscape = (event) => event.key === "Escape" && stopper.current.abort();
    if (busy === 0) return undefined;
    document.addEventListener("keydown", onEscape);
    return () => document.removeEventListener("keydown", onEscape);
  }, [busy > 0]);
  return html`<div onKeyDown=${onCtrlEnter(start)}>
    <${Heading} title="Playground" lead="One prompt, several models, side by side." />
    <div class="card form">
      <${Field} label="Prompt" wide>
        ${(id) => html`<textarea id=${id} rows="2" value=${prompt} onInput=${(event) => setPrompt(event.currentTarget.value)}></textarea>`}
      <//>
      <${AdapterPicker} label="Adapters" task="generate" chosen=${adapters} onChosen=${setAdapters}
        most=${MOST_LANES - (withBase ? 1 : 0)} colours=${COLOURS.slice(withBase ? 1 : 0)} />
      <details class="options-box">
        <summary>Sampling: temperature ${options.temperature || "0"}, ${options.max_new_tokens || "all"} tokens${options.seed && `, seed ${options.seed}`}</summary>
        <${Sampling} options=${options} onOptions=${setOptions} />
      </details>
      <div class="form-foot">
        ${busy > 0
          ? html`<${Button} kind="primary" icon="stop" onClick=${() => stopper.current.abort()}>Stop<//>`
          : html`<${Button} kind="primary" icon="play" disabled=${!canRun} onClick=${start}>Run<//>`}
        <${Segments} label="What the model does" value=${mode} options=${MODES} onValue=${setMode} />
        <${Check} checked=${withBase} onValue=${setBase} disabled=${lanes.length >= MOST_LANES && !withBase}>With the base model<//>
        <span class="help keys-help">Ctrl+Enter runs, Escape stops.</span>
      </div>
    </div>
    <p class="sr-only" role="status">${run.number > 0 && (busy > 0 ? "The models write." : "The models have ended.")}</p>
    ${lanes.length === 0
      ? html`<p class="help">Choose the base model or an adapter.</p>`
      : html`<div class="lanes">${lanes.map((model, index) => html`<${Lane} key=${model ?? ""}
          title=${model ?? "Base model"} colour=${COLOURS[index + (withBase ? 0 : 1)] ?? COLOURS[0]} request=${asked.get(model)}
          run=${run} onEnd=${(number) => ended.current(number)} />`)}</div>`}
  </div>`;
}

function Sampling({ options, onOptions }) {
  const field = (name) => ({ value: options[name], onValue: (value) => onOptions({ ...options, [name]: value }) });
  return html`<div class="form-row">
    <${TextField} label="Most tokens" inputmode="numeric" size="6" ...${field("max_new_tokens")} />
    <${TextField} label="Temperature" inputmode="decimal" size="6" help="0 takes the likeliest" ...${field("temperature")} />
    <${TextField} label="Top p" inputmode="decimal" size="6" ...${field("top_p")} />
    <${TextField} label="Top k" inputmode="numeric" size="6" help="0 is all" ...${field("top_k")} />
    <${TextField} label="Seed" inputmode="numeric" size="8" help="makes it repeatable" ...${field("seed")} />
  </div>`;
}

/** The options as the API takes them. What is empty is what the summary says: all tokens, and temperature 0. */
function numbers(options) {
  const filled = Object.entries(options).filter(([, value]) => value.trim() !== "");
  const given = Object.fromEntries(filled.map(([name, value]) => [name, numberOr(value)]));
  return { max_new_tokens: null, temperature: 0, ...given };
}
