// One training job: how far it is, its loss as a curve, what it said, and what came of it.

import { html, useMemo, useState } from "../html.js";
import { path, send } from "../api.js";
import { Chart } from "../chart.js";
import { count, figure, full, percent, tick } from "../format.js";
import { isFinished, losses, Status, useJob } from "../jobs.js";
import { href } from "../router.js";
import { notify, useAction } from "../store.js";
import { Button, Confirm, ErrorNote, Heading, Loading, Meter } from "../ui.js";

const MESSAGES_SHOWN = 100;
// What a job does before its first step.
const WAITS = {
  validating_files: "The server checks the files.",
  queued: "It waits for its turn.",
  running: "It makes ready: the first step has not ended yet.",
};
const IDS = ["Rows", "Validation rows", "Job", "Metrics"];
const NO_METRICS = ["step", "total_steps", "epoch", "train_loss", "eval_loss", "learning_rate"];

export function Job({ id }) {
  const { job, events, error, reload } = useJob(id);
  const [isAsked, setAsked] = useState(false);
  const { columns, last } = useMemo(() => losses(events), [events]);
  const cancel = useAction(() => send("POST", path`/v1/fine_tuning/jobs/${id}/cancel`));
  const model = job?.fine_tuned_model;
  const isGenerator = job?.adapter.task === "generate";
  return html`
    <${Heading} title=${job?.adapter.name ?? id} back=${{ href: href(["training"]), title: "Training" }}>
      ${model && html`<a class="button primary" href=${href([isGenerator ? "playground" : "classify"], { adapter: model })}>
        ${isGenerator ? "Try it" : "Classify with it"}</a>
        <a class="button plain" href=${href(["adapters", ...model.split("@")[0].split("/")])}>See the adapter</a>`}
      ${job && !isFinished(job) && html`<${Button} icon="stop" onClick=${() => setAsked(true)}>Cancel the job<//>`}
    <//>
    <${ErrorNote} error=${error} retry=${reload} />
    ${!job && !error && html`<${Loading} />`}
    ${job && html`
      <${Facts} job=${job} last=${last} />
      ${job.error?.message && html`<${ErrorNote} title="The job failed" error=${job.error} />`}
      <${Chart} title="Loss" isTime=${false} format=${tick} least=${null} data=${columns} series=${[
        { label: "training rows", colour: "lane-2", latest: last.train_loss === undefined ? "-" : figure(last.train_loss) },
        { label: "validation rows", colour: "lane-3", isSparse: true, latest: last.eval_loss === undefined ? "-" : figure(last.eval_loss) },
      ]} />
      <${Log} events=${events} />`}
    ${isAsked && job && !isFinished(job) && html`<${Confirm} title="Cancel this job?" verb="Cancel the job" wayOut="Let it run" action=${cancel} onClose=${() => setAsked(false)}
      onDone=${() => { setAsked(false); notify("The job is cancelled."); reload(); }}>
      <p>It stops within seconds. What it learned is lost.</p><//>`}`;
}

function Facts({ job, last }) {
  const hyper = job.method.supervised.hyperparameters;
  const share = last.total_steps ? last.step / last.total_steps : 0;
  const { adapter } = job;
  const shape = [adapter.method ?? "sera", adapter.rank && `rank ${adapter.rank}`, adapter.split && `split ${adapter.split}`];
  const facts = [
    ["State", html`<${Status} status=${job.status} />`],
    ["From", job.model],
    ["Rows", html`<code>${job.training_file}</code>`],
    job.validation_file && ["Validation rows", html`<code>${job.validation_file}</code>`],
    ["Task", adapter.task],
    ["Shape", adapter.init_from ?? shape.filter(Boolean).join(", ")],
    ["Epochs", hyper.n_epochs],
    ["Batch", hyper.batch_size],
    ["Learning rate", `x ${hyper.learning_rate_multiplier}`],
    ["Seed", job.seed],
    job.trained_tokens && ["Trained tokens", count(job.trained_tokens)],
    ["Job", html`<code>${job.id}</code>`],
    job.result_files.length > 0 && ["Metrics", html`<code>${job.result_files[0]}</code>`],
    ["Made", full(job.created_at)],
    job.finished_at && ["Finished", full(job.finished_at)],
    !isFinished(job) && job.estimated_finish && ["Ready about", full(job.estimated_finish)],
    ...Object.entries(last).filter(([name, value]) => !NO_METRICS.includes(name) && typeof value === "number")
      .map(([name, value]) => [name.replaceAll("_", " "), figure(value)]),
  ].filter(Boolean);
  return html`<section class="card form" aria-label="Facts">
    <p class="sr-only" role="status">The job's state: ${job.status.replaceAll("_", " ")}.</p>
    ${!isFinished(job) && html`<div class="memory-row">
      <p><span>${last.total_steps ? `Step ${count(last.step)} of ${count(last.total_steps)}` : WAITS[job.status] ?? WAITS.queued}</span>
        ${last.total_steps && html`<span class="muted">${percent(share)}</span>`}</p>
      <${Meter} share=${share} /></div>`}
    <dl class="facts">${facts.map(([term, value]) => html`<div key=${term} class=${IDS.includes(term) ? "id" : ""}>
      <dt>${term}</dt><dd>${value}</dd></div>`)}</dl>
  </section>`;
}

function Log({ events }) {
  const said = events.filter((event) => event.type !== "metrics").slice(-MESSAGES_SHOWN).reverse();
  if (said.length === 0) return null;
  return html`<section class="card" aria-labelledby="log-title">
    <h2 id="log-title">Events</h2>
    <ul class="log" tabindex="0" aria-label="Events, newest first">${said.map((event) => html`<li key=${event.id} class=${event.level === "error" ? "danger-text" : ""}>
      <time>${new Date(event.created_at * 1000).toLocaleTimeString("en-GB")}</time><span>${event.message}</span></li>`)}</ul>
  </section>`;
}
