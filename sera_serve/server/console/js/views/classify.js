// A text through several adapters with heads: labels as bars, numbers, or the text with its spans marked.

import { html, useEffect, useRef, useState } from "../html.js";
import { isAbort, send } from "../api.js";
import { TEXT_HEADS } from "../badges.js";
import { percent } from "../format.js";
import { AdapterPicker, useChosen } from "../picker.js";
import { Button, Check, ErrorNote, Field, Heading, Meter, onCtrlEnter } from "../ui.js";

const MOST = 8;
const LABELS_SHOWN = 8;
const PAUSE_MS = 350;

// What a person typed outlives a look at another view.
const kept = { text: "My parcel is late.", adapters: [], isLive: false };

export default function Classify() {
  const [text, setText] = useState(kept.text);
  const [adapters, setAdapters] = useChosen("classify", kept, () => MOST);
  const [isLive, setLive] = useState(kept.isLive);
  const [answers, setAnswers] = useState(new Map());
  const [busy, setBusy] = useState(false);
  const stopper = useRef(null);
  Object.assign(kept, { text, adapters, isLive });
  const canRun = text.trim() !== "" && adapters.length > 0;
  useEffect(() => () => stopper.current?.abort(), []);
  const run = async () => {
    if (!canRun) return;
    stopper.current?.abort();
    const { signal } = (stopper.current = new AbortController());
    setBusy(true);
    // A call for each: where one classifier is refused, the others still answer.
    await Promise.all(adapters.map(async (adapter) => {
      const answer = await classified(adapter, text, signal);
      if (!signal.aborted) setAnswers((old) => new Map(old).set(adapter, answer));
    }));
    if (!signal.aborted) setBusy(false);
  };
  useEffect(() => {
    if (!isLive) return undefined;
    const timer = setTimeout(run, PAUSE_MS);
    return () => clearTimeout(timer);
  }, [text, adapters, isLive]);
  const answered = adapters.filter((adapter) => answers.has(adapter));
  return html`<div onKeyDown=${onCtrlEnter(run)}>
    <${Heading} title="Classify" lead="One text through several adapters: its label, its number, or the names in it." />
    <div class="card form">
      <${Field} label="Text" wide>
        ${(id) => html`<textarea id=${id} rows="2" value=${text} onInput=${(event) => setText(event.currentTarget.value)}></textarea>`}
      <//>
      <${AdapterPicker} label="Classifiers" task=${TEXT_HEADS} chosen=${adapters} onChosen=${setAdapters} most=${MOST} />
      <div class="form-foot">
        <${Button} kind="primary" icon="play" busy=${busy && !isLive} disabled=${!canRun} onClick=${run}>Classify<//>
        <${Check} checked=${isLive} onValue=${setLive}>While I type<//>
        <span class="help keys-help">Ctrl+Enter classifies.</span>
      </div>
    </div>
    <p class="sr-only" role="status">${answered.map((adapter) => spoken(adapter, answers.get(adapter))).join(" ")}</p>
    <div class="answers">${answered.map((adapter) => html`<${Answer} key=${adapter} adapter=${adapter}
      isOld=${answers.get(adapter).text !== text} ...${answers.get(adapter)} />`)}</div>
  </div>`;
}

async function classified(adapter, text, signal) {
  try {
    const answer = await send("POST", "/v1/classify", { adapter, inputs: [text] }, signal);
    return { result: answer.results[0], text, version: answer.version, error: null };
  } catch (error) {
    return { result: null, text, version: null, error: isAbort(error) ? null : error };
  }
}

function spoken(adapter, { result }) {
  if (!result) return "";
  if ("score" in result) return `${adapter}: ${number(result.score)}.`;
  if (result.spans) return `${adapter}: ${result.spans.map((span) => `${span.text}, ${span.label}`).join("; ") || "no spans"}.`;
  if (result.labels) return `${adapter}: ${result.labels.join(", ") || "no label"}.`;
  return `${adapter}: ${result.label}, ${percent(result.probabilities[result.label])}.`;
}

// An answer stays while the text is changed, and until a slow adapter has answered to the new one.
function Answer({ adapter, isOld, result, text, version, error }) {
  return html`<section class="card answer" aria-label=${adapter}>
    <h2>${adapter}${version && html` <small>v${version}</small>`}${isOld && html` <small class="late">for an earlier text</small>`}</h2>
    <${ErrorNote} error=${error} />
    ${result && html`<${Result} result=${result} text=${text} />`}
  </section>`;
}

function Result({ result, text }) {
  if ("score" in result) return html`<p class="score">${number(result.score)}</p>`;
  if (result.spans) return html`<${Marked} text=${text} ...${result} />`;
  return html`<${Bars} probabilities=${result.probabilities} labels=${result.labels ?? [result.label]} />`;
}

function Bars({ probabilities, labels }) {
  const [showsAll, setShowsAll] = useState(false);
  const rows = Object.entries(probabilities).sort(([, one], [, other]) => other - one);
  const shown = showsAll ? rows : rows.slice(0, LABELS_SHOWN);
  const isOne = (label) => labels.includes(label);
  return html`<ul class="bars">${shown.map(([label, share]) => html`<li key=${label} class=${isOne(label) ? "is-first" : ""}>
      <span class="bar-label">${label}</span>
      <${Meter} share=${share} tone=${isOne(label) ? "accent" : "soft"} />
      <span class="bar-value">${percent(share)}</span>
    </li>`)}</ul>
    ${rows.length > LABELS_SHOWN && html`<${Button} kind="quiet" onClick=${() => setShowsAll(!showsAll)}>
      ${showsAll ? "Show fewer" : `Show all ${rows.length} labels`}<//>`}`;
}

function Marked({ text, spans, truncated }) {
  // The server counts code points, a string of JavaScript counts parts of them.
  const characters = Array.from(text);
  const part = (start, end) => characters.slice(start, end).join("");
  let done = 0;
  const parts = spans.map((span) => {
    const before = part(done, span.start);
    done = span.end;
    return html`${before}<mark key=${span.start} title=${percent(span.score)}>${span.text}<small>${span.label}</small></mark>`;
  });
  return html`<p class="marked">${parts}${part(done)}</p>
    ${spans.length === 0 && html`<p class="muted">No spans found.</p>`}
    ${truncated && html`<p class="muted">The text is longer than the adapter reads: nothing was looked for in its rest.</p>`}`;
}

function number(value) {
  return Number(value.toPrecision(5)).toString();
}
