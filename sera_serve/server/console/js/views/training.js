// Training on the server: files of rows, jobs, one job, and the form of a new one.

import { html, useEffect } from "../html.js";
import { path, send } from "../api.js";
import { DropZone, Progress, StopUpload, Upload } from "../files.js";
import { bytes } from "../format.js";
import { Status, useNewest } from "../jobs.js";
import { href, route } from "../router.js";
import { notify, useAction, useDialog, useStore } from "../store.js";
import { Button, Confirm, Empty, ErrorNote, Heading, Loading, When } from "../ui.js";
import { Job } from "./job.js";
import { NewJob } from "./new_job.js";

// What a person chose outlives a look at another view, and a key that expires.
const sending = new Upload("/v1/files");

export default function Training({ me }) {
  const { parts } = useStore(route);
  if (parts[1] === "new") return html`<${NewJob} me=${me} />`;
  if (parts[1] !== undefined && parts[1] !== "files") return html`<${Job} key=${parts[1]} id=${parts[1]} />`;
  const isFiles = parts[1] === "files";
  return html`
    <${Heading} title="Training" lead="Your rows in, an adapter out. It serves as soon as it is trained.">
      <a class="button primary" href=${href(["training", "new"])}>New job</a>
    <//>
    <nav class="tabs" aria-label="Training">
      <a href=${href(["training"])} aria-current=${isFiles ? undefined : "page"}>Jobs</a>
      <a href=${href(["training", "files"])} aria-current=${isFiles ? "page" : undefined}>Files</a>
    </nav>
    ${isFiles ? html`<${Files} />` : html`<${Jobs} />`}`;
}

function Jobs() {
  const { rows: jobs, data, error, loading, reload, hasMore, more } = useNewest("/v1/fine_tuning/jobs");
  return html`
    <${ErrorNote} error=${error} retry=${reload} />
    ${!data && loading && html`<${Loading} />`}
    ${data && jobs.length === 0 && html`<${Empty} title="No job yet">
      <p>Upload a file of rows, then make a job of it.</p>
      <p class="actions"><a class="button plain" href=${href(["training", "files"])}>Files</a>
        <a class="button primary" href=${href(["training", "new"])}>New job</a></p><//>`}
    ${jobs.length > 0 && html`<div class="table-box"><table class="stacked">
      <thead><tr><th scope="col">Job</th><th scope="col">State</th><th scope="col">Task</th><th scope="col">From</th><th scope="col">Rows</th>
        <th scope="col">Result</th><th scope="col">Made</th></tr></thead>
      <tbody>${jobs.map((job) => html`<tr key=${job.id}>
        <th scope="row"><a href=${href(["training", job.id])}>${job.adapter.name}</a></th>
        <td data-label="State"><${Status} status=${job.status} /></td>
        <td data-label="Task">${job.adapter.task}</td>
        <td data-label="From" class="breaks">${job.model}</td>
        <td data-label="Rows"><code>${job.training_file}</code></td>
        <td data-label="Result" class="breaks">${job.fine_tuned_model ? html`<${ModelLink} model=${job.fine_tuned_model} />` : "-"}</td>
        <td data-label="Made"><${When} at=${job.created_at} /></td>
      </tr>`)}</tbody>
    </table></div>
    ${hasMore && html`<${Older} shown=${jobs.length} busy=${loading} more=${more} />`}
    <p><${Button} kind="quiet" busy=${loading} onClick=${reload}>Refresh<//></p>`}`;
}

function Older({ shown, busy, more }) {
  return html`<p class="more"><span class="help">Only the newest ${shown} are shown. </span><${Button} busy=${busy} onClick=${more}>Show more<//></p>`;
}

function ModelLink({ model }) {
  const adapter = model.split("@")[0];
  return html`<a href=${href(["adapters", ...adapter.split("/")])}>${model}</a>`;
}

function Files() {
  const files = useNewest("/v1/files", { purpose: "fine-tune" });
  const { files: chosen, progress, error, answer } = useStore(sending);
  const [doomed, setDoomed, close] = useDialog();
  const busy = progress !== null;
  useEffect(() => sending.leave.bind(sending), []);
  useEffect(() => {
    if (answer === null) return;
    sending.choose([]);
    files.reload();
  }, [answer]);
  const submit = async (event) => {
    event.preventDefault();
    if (chosen.length !== 1) return;
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", chosen[0]);
    const file = await sending.send(form, chosen[0].size);
    if (file !== null) notify(`${file.filename} is ${file.id}.`);
  };
  const { rows } = files;
  return html`
    <form class="card form" onSubmit=${submit}>
      <${DropZone} label="Drop a JSONL file here, or choose one" accept=".jsonl,.json,application/jsonl" files=${chosen}
        disabled=${busy} onFiles=${(some) => sending.choose(some)}
        help=${html`One JSON object a line: <code>messages</code>, or <code>prompt</code> and <code>completion</code>, or${" "}
          <code>text</code> with <code>label</code>, <code>labels</code>, <code>score</code> or <code>spans</code>.`} />
      ${progress && html`<${Progress} ...${progress} what="Upload" />`}
      <div class="form-foot">
        <${Button} kind="primary" icon="upload" type="submit" busy=${busy} disabled=${chosen.length !== 1}>Upload<//>
        ${progress && html`<${StopUpload} upload=${sending} ...${progress} />`}
        ${chosen.length > 1 && html`<span class="help" role="status">One file at a time.</span>`}
      </div>
      <${ErrorNote} error=${error} />
    </form>
    <${ErrorNote} error=${files.error} retry=${files.reload} />
    ${!files.data && files.loading && html`<${Loading} />`}
    ${files.data && rows.length === 0 && html`<${Empty} title="No file yet"><p>The server checks each row when it gets the file.</p><//>`}
    ${rows.length > 0 && html`<div class="table-box"><table class="stacked">
      <thead><tr><th scope="col">File</th><th scope="col">Id</th><th scope="col" class="number">Size</th>
        <th scope="col">Uploaded</th><th scope="col"><span class="sr-only">Actions</span></th></tr></thead>
      <tbody>${rows.map((file) => html`<tr key=${file.id}>
        <th scope="row">${file.filename}</th>
        <td data-label="Id"><code>${file.id}</code></td>
        <td data-label="Size" class="number">${bytes(file.bytes)}</td>
        <td data-label="Uploaded"><${When} at=${file.created_at} /></td>
        <td class="row-actions">
          <a class="button quiet" href=${href(["training", "new"], { file: file.id })}>Train on it</a>
          <${Button} kind="quiet danger-text" icon="trash" label=${`Delete ${file.filename}`} onClick=${() => setDoomed(file)} /></td>
      </tr>`)}</tbody>
    </table></div>`}
    ${files.hasMore && html`<${Older} shown=${rows.length} busy=${files.loading} more=${files.more} />`}
    ${doomed && html`<${DeleteFile} file=${doomed} onClose=${close} onDone=${() => {
      close();
      files.reload();
    }} />`}`;
}

function DeleteFile({ file, onClose, onDone }) {
  const action = useAction(() => send("DELETE", path`/v1/files/${file.id}`));
  return html`<${Confirm} title=${`Delete ${file.filename}?`} verb="Delete" action=${action} onClose=${onClose} onDone=${onDone}>
    <p>Jobs that are finished keep their adapters. Nobody can bring the file back.</p>
  <//>`;
}
