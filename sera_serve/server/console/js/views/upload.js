// Publishing an adapter: a file, a name, and what the server says of it.

import { html, useEffect, useState } from "../html.js";
import { DropZone, Progress, StopUpload, Upload } from "../files.js";
import { Icon } from "../icons.js";
import { href, route } from "../router.js";
import { notify, useStore } from "../store.js";
import { Button, ErrorNote, Heading, TextField } from "../ui.js";

const TYPES = ".safetensors,.tar,.zip,.json";

// What a person chose and typed outlives a look at another view, and a key that expires.
const sending = new Upload("/v1/adapters");
let kept = null;

export default function UploadView({ me }) {
  const [name, setName] = useState(kept ?? (me.tenant && !me.scopes.includes("admin") ? `${me.tenant}/` : ""));
  const { files, progress, error, answer: published } = useStore(sending);
  kept = name;
  useEffect(() => () => {
    if (sending.value.answer !== null) kept = null;
    sending.leave();
  }, []);
  const [bundle, ...otherBundles] = files.filter((file) => !file.name.endsWith(".json"));
  const [config, ...otherConfigs] = files.filter((file) => file.name.endsWith(".json"));
  const isOne = otherBundles.length + otherConfigs.length === 0;
  const canPublish = bundle !== undefined && isOne && name.trim() !== "";
  const busy = progress !== null;
  const publish = async () => {
    const form = new FormData();
    form.append("name", name.trim());
    form.append("bundle", bundle);
    if (config) form.append("config", config);
    const answer = await sending.send(form, bundle.size);
    if (answer !== null && route.value.parts[0] !== "upload") notify(`${answer.adapter} version ${answer.version} is published.`);
  };
  const choose = (chosen) => {
    sending.choose(chosen);
    const stem = chosen.find((file) => !file.name.endsWith(".json"))?.name.replace(/\.(safetensors|tar|zip)$/i, "");
    // The name of a checkpoint's file tells nothing.
    if (stem && stem !== "adapter_model" && (name === "" || name.endsWith("/"))) setName(name + asName(stem));
  };
  const submit = (event) => {
    event.preventDefault();
    if (canPublish) publish();
  };
  return html`
    <${Heading} title="Upload" lead="Publish a trained adapter as the next version of its name. It serves at once." />
    <form class="card form" onSubmit=${submit}>
      <${DropZone} label="Drop an adapter here, or choose a file" accept=${TYPES} multiple files=${files} onFiles=${choose}
        disabled=${busy} help="A bundle (.safetensors or .tar), or a PEFT checkpoint: its directory as .tar or .zip,
          or adapter_model.safetensors together with adapter_config.json." />
      <${TextField} label="Name" value=${name} onValue=${setName} placeholder="tenant/name" disabled=${busy}
        help="tenant/name, in small letters. A name that exists gets a new version." wide />
      ${progress && html`<${Progress} ...${progress} what="Upload" />`}
      <div class="form-foot">
        <${Button} kind="primary" icon="upload" type="submit" busy=${busy} disabled=${!canPublish}>Publish<//>
        ${progress && html`<${StopUpload} upload=${sending} ...${progress} />`}
        ${!isOne && html`<span class="help" role="status">One adapter at a time: one file of weights, and its adapter_config.json.</span>`}
        ${!bundle && config && html`<span class="help">adapter_config.json needs the file of weights beside it.</span>`}
      </div>
      <${ErrorNote} error=${error} />
      ${published && html`<${Published} ...${published} />`}
    </form>`;
}

/** The text as the name of an adapter may be written. */
function asName(text) {
  return text.toLowerCase().replaceAll(/[^a-z0-9._-]+/g, "-").replaceAll(/\.{2,}/g, ".").replaceAll(/^[._-]+|[._-]+$/g, "").slice(0, 64);
}

function Published({ adapter, version, warnings }) {
  const [tenant, name] = adapter.split("/");
  return html`<div class="note good" role="status">
    <${Icon} name="check" />
    <div>
      <strong>${adapter} version ${version} is published</strong>
      ${warnings.length > 0 && html`<ul>${warnings.map((warning) => html`<li>${warning}</li>`)}</ul>`}
      <p><a href=${href(["adapters", tenant, name])}>See its versions</a></p>
    </div>
  </div>`;
}
