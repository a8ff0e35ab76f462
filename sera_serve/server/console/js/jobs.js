// What the views of training share: states of a job, and its events as they come.

import { get, path } from "./api.js";
import { html, useRef, useState } from "./html.js";
import { usePages, usePolling } from "./store.js";
import { Badge } from "./ui.js";

const EVERY_MS = 1500;
const PAGE = 100;
const SHOWN = 50;
const TONES = {
  validating_files: "plain", queued: "plain", running: "accent", succeeded: "good", failed: "danger", cancelled: "warn",
};

/** Whether nothing more comes of a job. */
export const isFinished = (job) => ["succeeded", "failed", "cancelled"].includes(job.status);

/** A job's state. */
export function Status({ status }) {
  return html`<${Badge} tone=${TONES[status] ?? "plain"}>${status.replaceAll("_", " ")}<//>`;
}

/**
 * The newest of a list of OpenAI's form, such as the jobs. `more` shows as many again.
 *
 * The result is `{rows, hasMore, more}` beside what `useLoad` gives.
 */
export function useNewest(url, query = {}) {
  const read = async (after, signal) => {
    const page = await get(url, { ...query, limit: SHOWN, after }, signal);
    return { rows: page.data, next: page.has_more ? page.data.at(-1)?.id ?? null : null };
  };
  const list = usePages(read, [url], SHOWN);
  return { ...list, rows: list.data?.rows ?? [] };
}

/** A job with its events, oldest first; both are asked for again until the job is finished. */
export function useJob(id) {
  const [state, setState] = useState({ job: null, events: [] });
  const known = useRef(new Map());
  const polling = usePolling(async (signal) => {
    const job = await get(path`/v1/fine_tuning/jobs/${id}`, {}, signal);
    // After the job's state: no event of a finished job is missed.
    await readEvents(id, known.current, signal);
    setState({ job, events: [...known.current.values()] });
    return isFinished(job);
  }, EVERY_MS, [id]);
  return { ...state, ...polling };
}

/** Add the events that are not known yet, oldest first. The API gives the newest first, a page at a time. */
async function readEvents(id, known, signal) {
  const fresh = [];
  let after = null;
  while (true) {
    const page = await get(path`/v1/fine_tuning/jobs/${id}/events`, { limit: PAGE, after }, signal);
    const unknown = page.data.filter((event) => !known.has(event.id));
    fresh.push(...unknown);
    if (unknown.length < page.data.length || !page.has_more || page.data.length === 0) break;
    after = page.data.at(-1).id;
  }
  for (const event of fresh.reverse()) known.set(event.id, event);
}

/** The losses of a job's events as a chart takes them: steps, training losses, losses on the validation rows. */
export function losses(events) {
  const rows = events.filter((event) => event.type === "metrics" && typeof event.data?.step === "number");
  const steps = new Map();
  for (const { data } of rows) steps.set(data.step, { ...steps.get(data.step), ...data });
  const sorted = [...steps.values()].sort((one, other) => one.step - other.step);
  const column = (name) => sorted.map((row) => row[name] ?? null);
  return { columns: [column("step"), column("train_loss"), column("eval_loss")], last: merged(sorted) };
}

/** The newest value of each metric. */
function merged(rows) {
  const filled = rows.map((row) => Object.fromEntries(Object.entries(row).filter(([, value]) => value !== null)));
  return Object.assign({}, ...filled);
}
