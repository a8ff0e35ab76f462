// The form of a training job.

import { html, useState } from "../html.js";
import { get, send } from "../api.js";
import { numberOr } from "../format.js";
import { goOn, href, route } from "../router.js";
import { may } from "../session.js";
import { notify, useAction, useLoad } from "../store.js";
import { Button, ErrorNote, Heading, SelectField, TextField } from "../ui.js";

const TASKS = [["", "By the rows"], ["generate", "Generate text"], ["classify", "Classify"], ["multi-label", "Several labels"], ["regress", "Give a number"], ["token-classify", "Find spans"]];
const METHODS = [["", "SeRA"], ["lora", "LoRA"], ["melora", "MELoRA"], ["moslora", "MoSLoRA"], ["lora-fa", "LoRA-FA"], ["sera-freeze-a", "SeRA, A frozen"], ["sera-freeze-b", "SeRA, B frozen"], ["sera-c-only", "SeRA, C alone"], ["head-only", "Head only"]];
const EMPTY = {
  tenant: "",
  model: "", training_file: "", validation_file: "", suffix: "", seed: "",
  n_epochs: "", batch_size: "", learning_rate_multiplier: "",
  task: "", method: "", rank: "", split: "", target_modules: "",
};
const FILES = 100;
const HYPERPARAMETERS = ["n_epochs", "batch_size", "learning_rate_multiplier"];
const SHAPE = ["tenant", "task", "method", "rank", "split"];
const TEXTS = ["tenant", "task", "method"];

// What a person typed outlives a look at another view, and a key that expires.
let kept = EMPTY;

export function NewJob({ me }) {
  const [values, setValues] = useState({ ...kept, training_file: route.value.query.get("file") ?? kept.training_file });
  const files = useLoad((signal) => get("/v1/files", { limit: FILES, purpose: "fine-tune" }, signal), []);
  kept = values;
  const action = useAction(async () => {
    const job = await send("POST", "/v1/fine_tuning/jobs", bodyOf(values, me.base.name));
    // In the view, if it is still there, and for the next visit.
    setValues(EMPTY);
    kept = EMPTY;
    if (!goOn(["training", "new"], ["training", job.id])) notify(`The job of ${job.adapter.name} is made.`);
  });
  const field = (name) => ({ value: values[name], onValue: (value) => setValues({ ...values, [name]: value }) });
  const choices = (files.data?.data ?? []).map((file) => [file.id, `${file.filename} (${file.id})`]);
  // A file may be older than the list goes.
  const choicesOf = (name) => (values[name] && !choices.some(([id]) => id === values[name]) ? [[values[name], values[name]], ...choices] : choices);
  const submit = (event) => {
    event.preventDefault();
    if (values.training_file) action.run();
  };
  return html`
    <${Heading} title="New job" back=${{ href: href(["training"]), title: "Training" }}
      lead="Only the file of rows is needed. The server knows the rest." />
    <${ErrorNote} error=${files.error} retry=${files.reload} />
    <form class="card form" onSubmit=${submit}>
      <div class="fields-2">
        <${SelectField} label="Rows to train on" ...${field("training_file")} options=${[["", "Choose a file"], ...choicesOf("training_file")]}
          help=${files.data && html`<${FilesHelp} number=${choices.length} hasMore=${files.data.has_more} />`} />
        <${SelectField} label="Rows to validate with" ...${field("validation_file")} options=${[["", "None"], ...choicesOf("validation_file")]} />
        <${TextField} label="Suffix" ...${field("suffix")} placeholder="support" help="Becomes a part of the adapter's name: small letters, digits, . _ -" />
        <${TextField} label="Start from" ...${field("model")} placeholder=${me.base.name} help="The base, or an adapter to go on from." />
        ${may(me, "admin") && html`<${TextField} label="Tenant" ...${field("tenant")} placeholder=${me.tenant ?? "default"}
          help="Whose the job and the adapter are." />`}
      </div>
      <details class="options-box"><summary>How it learns</summary>
        <div class="fields-2">
          <${TextField} label="Epochs" inputmode="numeric" placeholder="auto" ...${field("n_epochs")} />
          <${TextField} label="Batch size" inputmode="numeric" placeholder="auto" ...${field("batch_size")} />
          <${TextField} label="Learning rate, times" inputmode="decimal" placeholder="auto" ...${field("learning_rate_multiplier")} />
          <${TextField} label="Seed" inputmode="numeric" ...${field("seed")} />
        </div>
      </details>
      <details class="options-box"><summary>The adapter's shape</summary>
        <div class="fields-2">
          <${SelectField} label="Task" options=${TASKS} ...${field("task")} />
          <${SelectField} label="Method" options=${METHODS} ...${field("method")} />
          <${TextField} label="Rank" inputmode="numeric" placeholder="auto" ...${field("rank")} />
          <${TextField} label="Split" inputmode="numeric" placeholder="auto" ...${field("split")} help="Segments of A and B; 1 is LoRA's." />
          <${TextField} label="Layers" placeholder="auto" ...${field("target_modules")} help="Names with commas: q_proj, v_proj." />
        </div>
      </details>
      <div class="form-foot">
        <${Button} kind="primary" icon="training" type="submit" busy=${action.busy} disabled=${!values.training_file}>Start<//>
      </div>
      <${ErrorNote} error=${action.error} />
    </form>`;
}

function FilesHelp({ number, hasMore }) {
  const files = (text) => html`<a href=${href(["training", "files"])}>${text}</a>`;
  if (number === 0) return html`No file yet: ${files("upload one")}.`;
  return hasMore ? html`The newest ${number}. An older one is among the ${files("files")}: Train on it.` : null;
}

/** The request of a form. What is empty is left to the server. */
function bodyOf(values, base) {
  const read = (name) => (TEXTS.includes(name) ? values[name].trim() : numberOr(values[name].trim()));
  const some = (names) => Object.fromEntries(names.filter((name) => values[name].trim() !== "").map((name) => [name, read(name)]));
  const body = { model: values.model.trim() || base, training_file: values.training_file };
  if (values.validation_file) body.validation_file = values.validation_file;
  if (values.suffix.trim()) body.suffix = values.suffix.trim();
  if (values.seed.trim()) body.seed = read("seed");
  const hyperparameters = some(HYPERPARAMETERS);
  if (Object.keys(hyperparameters).length > 0) body.method = { type: "supervised", supervised: { hyperparameters } };
  const shape = some(SHAPE);
  const layers = values.target_modules.split(",").map((layer) => layer.trim()).filter(Boolean);
  if (layers.length > 0) shape.target_modules = layers;
  if (Object.keys(shape).length > 0) body.adapter = shape;
  return body;
}
