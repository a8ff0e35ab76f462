// What the server does now: rates from the differences of its counters.

import { html, useState } from "../html.js";
import { get } from "../api.js";
import { Chart, Stat } from "../chart.js";
import { bytes, count, percent, seconds, short } from "../format.js";
import { usePolling } from "../store.js";
import { ErrorNote, Heading, Loading, Meter } from "../ui.js";
import { isForAnotherBase } from "../wrong_base.js";

const EVERY_MS = 2000;
const KEPT = 150;
// Samples that a rate spans.
const WINDOW = 5;
const SHOWN = 8;
const BUSIEST_SAMPLES = 15;

// The last minutes outlive a look at another view.
let history = [];

export default function Live({ me }) {
  const [samples, setSamples] = useState(history);
  const { error, reload } = usePolling(async (signal) => {
    history = added(history, await get("/v1/stats", {}, signal));
    setSamples(history);
  }, EVERY_MS, []);
  const now = samples.at(-1);
  return html`
    <${Heading} title="Live" lead=${`The last ${Math.round((KEPT * EVERY_MS) / 60000)} minutes, every ${EVERY_MS / 1000} seconds.`} />
    <${ErrorNote} error=${error} retry=${reload} />
    ${now ? html`<${Figures} samples=${samples} now=${now} generates=${!isForAnotherBase("playground", me)} />` : !error && html`<${Loading} rows="6" />`}`;
}

// One of them falls when the server begins again. A server that only classifies makes no tokens.
const COUNTERS = [(sample) => sample.tokens.completion, (sample) => sample.classified_inputs, (sample) => sample.waits.count];

/** The samples with one more. What was before the server began again is dropped. */
function added(samples, sample) {
  const last = samples.at(-1);
  if (last && (sample.at <= last.at || COUNTERS.some((counter) => counter(sample) < counter(last)))) return [sample];
  const kept = [...samples, sample].slice(-KEPT);
  const old = kept.at(-2 - BUSIEST_SAMPLES);
  // Of thousands of adapters: an older sample is asked for sums alone.
  if (old) Object.assign(old, { by_tenant: {}, by_adapter: {} });
  return kept;
}

/** For each sample but the first: what `read` makes of it and of an earlier one, ten seconds before if there is one. */
function differences(samples, read) {
  return samples.slice(1).map((now, index) => read(now, samples[Math.max(0, index + 1 - WINDOW)]));
}

/** The change of a counter, in a second. A generation's tokens are counted when it ends, so that they come in bursts. */
function rates(samples, counter) {
  return differences(samples, (now, then) => (counter(now) - counter(then)) / (now.at - then.at));
}

/** The mean of what was measured, or null for nothing. */
function means(samples, summary) {
  return differences(samples, (now, then) => {
    const [later, before] = [summary(now), summary(then)];
    return later.count > before.count ? (later.sum - before.sum) / (later.count - before.count) : null;
  });
}

/** The share of one tier in all hits, or null for none. */
function shares(samples, tier) {
  return differences(samples, ({ adapters: { hits } }, { adapters: { hits: before } }) => {
    const all = total(hits) - total(before);
    return all > 0 ? ((hits[tier] ?? 0) - (before[tier] ?? 0)) / all : null;
  });
}

const total = (hits) => Object.values(hits).reduce((sum, value) => sum + value, 0);
const latest = (values, format) => (values.length && values.at(-1) !== null ? format(values.at(-1)) : "-");

function Figures({ samples, now, generates }) {
  const times = samples.slice(1).map((sample) => sample.at);
  const completion = rates(samples, (sample) => sample.tokens.completion);
  const prompt = rates(samples, (sample) => sample.tokens.prompt);
  const inputs = rates(samples, (sample) => sample.classified_inputs);
  const first = means(samples, (sample) => sample.first_token);
  const waits = means(samples, (sample) => sample.waits);
  const column = (read) => samples.slice(1).map(read);
  return html`
    <div class="stats">
      ${generates
        ? html`<${Stat} term="New tokens" value=${latest(completion, short)} unit="a second" />
            <${Stat} term="First token" value=${latest(first, seconds)} unit="mean" />`
        : html`<${Stat} term="Classified inputs" value=${latest(inputs, short)} unit="a second" />
            <${Stat} term="Wait for the batch" value=${latest(waits, seconds)} unit="mean" />`}
      <${Stat} term="In flight" value=${count(now.requests_in_flight)} unit="requests" />
      <${Stat} term="Adapters" value=${count(now.adapters.resident)} unit="on the device" />
    </div>
    <div class="charts">
      <${Lines} title="Throughput" times=${times} format=${short} lines=${[
        generates && ["new tokens/s", "lane-2", completion],
        generates && ["prompt tokens/s", "lane-1", prompt],
        ["classified/s", "lane-3", inputs],
      ]} />
      <${Lines} title="Waiting time" times=${times} format=${seconds} axis=${seconds} lines=${[
        generates && ["to the first token", "lane-2", first],
        ["for the batch", "lane-3", waits],
      ]} />
      <${Lines} title="Queue" times=${times} format=${count} lines=${[
        ["running", "lane-2", column((sample) => sample.running)],
        ["waiting", "lane-3", column((sample) => sample.waiting)],
      ]} />
      <${Lines} title="Where adapters were found" times=${times} format=${percent} axis=${percent} most=${1.04} lines=${[
        ["device", "lane-2", shares(samples, "device")],
        ["host", "lane-3", shares(samples, "host")],
        ["store", "lane-5", shares(samples, "store")],
      ]} />
      <${Memory} adapters=${now.adapters} pages=${now.cache_pages} />
      <${Busiest} title="Tenants" samples=${samples} read=${(sample) => sample.by_tenant} />
      <${Busiest} title="Adapters" samples=${samples} read=${(sample) => sample.by_adapter} />
    </div>`;
}

/** A chart of columns over `times`. `lines` are [name, colour, column], or false. `format` writes the latest values. */
function Lines({ title, times, lines, format, axis, most }) {
  const shown = lines.filter(Boolean);
  return html`<${Chart} title=${title} data=${[times, ...shown.map(([, , column]) => column)]} format=${axis} most=${most}
    series=${shown.map(([label, colour, column]) => ({ label, colour, latest: latest(column, format) }))} />`;
}

function Memory({ adapters, pages }) {
  const rows = [
    ["Adapters on the device", adapters.device_bytes, adapters.device_limit, bytes],
    ["Adapters in the host's memory", adapters.host_bytes, adapters.host_limit, bytes],
    pages && pages.total > 0 && ["Pages of the KV cache", pages.in_use, pages.total, count],
  ].filter(Boolean);
  return html`<section class="card memory" aria-label="Memory">
    <h2>Memory</h2>
    ${rows.map(([name, used, all, format]) => html`<div class="memory-row" key=${name}>
      <p><span>${name}</span><span class="muted">${format(used)} of ${format(all)}</span></p>
      <${Meter} share=${all ? used / all : 0} tone=${used > all * 0.95 ? "warn" : "accent"} label=${percent(all ? used / all : 0)} />
    </div>`)}
    <p class="help">${count(adapters.resident)} adapters on the device, ${count(adapters.pinned)} of them pinned,
      ${" "}${count(adapters.loading)} on the way. ${count(adapters.evictions)} left to make room since the start.</p>
  </section>`;
}

/** Who asks most: rates over the last half minute, since requests come in bursts. */
function Busiest({ title, samples, read }) {
  const now = samples.at(-1);
  const then = samples[Math.max(0, samples.length - 1 - BUSIEST_SAMPLES)];
  const span = Math.max(1, now.at - then.at);
  const rows = Object.entries(read(now)).map(([name, counters]) => {
    // A tenant may be called "constructor", which every object has.
    const before = Object.hasOwn(read(then), name) ? read(then)[name] : { requests: 0, tokens: 0 };
    return { name, requests: (counters.requests - before.requests) / span, tokens: (counters.tokens - before.tokens) / span };
  }).sort((one, other) => other.requests - one.requests || other.tokens - one.tokens);
  const most = Math.max(1e-9, ...rows.map((row) => row.requests));
  return html`<section class="card" aria-label=${title}>
    <h2>${title}</h2>
    ${rows.length === 0 ? html`<p class="help">No request yet.</p>` : html`<table>
      <thead><tr><th scope="col">Name</th><th scope="col" class="meter-cell"><span class="sr-only">Share of requests</span></th>
        <th scope="col" class="number">Requests/s</th><th scope="col" class="number">Tokens/s</th></tr></thead>
      <tbody>${rows.slice(0, SHOWN).map((row) => html`<tr key=${row.name}>
        <th scope="row">${row.name}</th>
        <td class="meter-cell"><${Meter} share=${row.requests / most} label=${`${row.requests.toFixed(1)} requests a second`} /></td>
        <td class="number">${row.requests.toFixed(1)}</td><td class="number">${short(row.tokens)}</td>
      </tr>`)}</tbody>
    </table>`}
    ${rows.length > SHOWN && html`<p class="help">The busiest ${SHOWN} of ${rows.length}.</p>`}
  </section>`;
}
