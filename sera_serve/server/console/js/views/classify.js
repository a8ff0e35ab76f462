// A text through several classifiers: the probability of each label as a bar.

import { html, useEffect, useRef, useState } from "../html.js";
import { isAbort, send } from "../api.js";
import { percent } from "../format.js";
import { AdapterPicker } from "../picker.js";
import { replace, route } from "../router.js";
import { Button, Check, ErrorNote, Field, Heading, Meter } from "../ui.js";

const MOST = 8;
const LABELS_SHOWN = 8;
const PAUSE_MS = 350;

// What a person typed outlives a look at another view.
const kept = { text: "My parcel is late and the tracking number does not work.", adapters: [], isLive: false };

export default function Classify() {
  const [text, setText] = useState(kept.text);
  const [adapters, setAdapters] = useState(() => named() ?? kept.adapters);
  const [isLive, setLive] = useState(kept.isLive);
  const [answers, setAnswers] = useState({});
  const [busy, setBusy] = useState(false);
  const stopper = useRef(null);
  Object.assign(kept, { text, adapters, isLive });
  const canRun = text.trim() !== "" && adapters.length > 0;
  useEffect(() => replace(["classify"], { adapter: adapters }), [adapters]);
  useEffect(() => () => stopper.current?.abort(), []);
  const run = async () => {
    if (!canRun) return;
    stopper.current?.abort();
    const { signal } = (stopper.current = new AbortController());
    setBusy(true);
    // A call for each: where one classifier is refused, the others still answer.
    await Promise.all(adapters.map(async (adapter) => {
      const answer = await classified(adapter, text, signal);
      if (!signal.aborted) setAnswers((old) => ({ ...old, [adapter]: answer }));
    }));
    if (!signal.aborted) setBusy(false);
  };
  useEffect(() => {
    if (!isLive) return undefined;
    const timer = setTimeout(run, PAUSE_MS);
    return () => clearTimeout(timer);
  }, [text, adapters, isLive]);
  const onKey = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    }
  };
  const answered = adapters.filter((adapter) => answers[adapter]);
  return html`<div onKeyDown=${onKey}>
    <${Heading} title="Classify" lead="One text, several classifiers, and how sure each one is." />
    <div class="card form">
      <${Field} label="Text" wide>
        ${(id) => html`<textarea id=${id} rows="2" value=${text} onInput=${(event) => setText(event.currentTarget.value)}></textarea>`}
      <//>
      <${AdapterPicker} label="Classifiers" task="classify" chosen=${adapters} onChosen=${setAdapters} most=${MOST} />
      <div class="form-foot">
        <${Button} kind="primary" icon="play" busy=${busy && !isLive} disabled=${!canRun} onClick=${run}>Classify<//>
        <${Check} checked=${isLive} onValue=${setLive}>While I type<//>
        <span class="help keys-help">Ctrl+Enter classifies.</span>
      </div>
    </div>
    <p class="sr-only" role="status">${answered.map((adapter) => spoken(adapter, answers[adapter])).join(" ")}</p>
    <div class="answers">${answered.map((adapter) => html`<${Answer} key=${adapter} adapter=${adapter} ...${answers[adapter]} />`)}</div>
  </div>`;
}

async function classified(adapter, text, signal) {
  try {
    const answer = await send("POST", "/v1/classify", { adapter, inputs: [text] }, signal);
    return { result: answer.results[0], version: answer.version, error: null };
  } catch (error) {
    return { result: null, version: null, error: isAbort(error) ? null : error };
  }
}

function spoken(adapter, { result }) {
  return result ? `${adapter}: ${result.label}, ${percent(result.probabilities[result.label])}.` : "";
}

function Answer({ adapter, result, version, error }) {
  const [showsAll, setShowsAll] = useState(false);
  const rows = Object.entries(result?.probabilities ?? {}).sort(([, one], [, other]) => other - one);
  const shown = showsAll ? rows : rows.slice(0, LABELS_SHOWN);
  return html`<section class="card answer" aria-label=${adapter}>
    <h2>${adapter}${version && html` <small>v${version}</small>`}</h2>
    <${ErrorNote} error=${error} />
    ${result && html`<ul class="bars">${shown.map(([label, share], index) => html`<li key=${label} class=${index === 0 ? "is-first" : ""}>
      <span class="bar-label">${label}</span>
      <${Meter} share=${share} tone=${index === 0 ? "accent" : "soft"} label=${percent(share)} />
      <span class="bar-value">${percent(share)}</span>
    </li>`)}</ul>
    ${rows.length > LABELS_SHOWN && html`<${Button} kind="quiet" onClick=${() => setShowsAll(!showsAll)}>
      ${showsAll ? "Show fewer" : `Show all ${rows.length} labels`}<//>`}`}
  </section>`;
}

function named() {
  const adapters = route.value.query.getAll("adapter").slice(0, MOST);
  return adapters.length > 0 ? adapters : null;
}
