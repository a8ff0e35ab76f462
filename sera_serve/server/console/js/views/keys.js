// Keys of all tenants, for an admin: make one, see its secret once, revoke it.

import { html, useState } from "../html.js";
import { get, path, send } from "../api.js";
import { partOf } from "../format.js";
import { begin, signIn } from "../session.js";
import { notify, useAction, useDialog, useLoad } from "../store.js";
import {
  Badge, Button, Check, Confirm, CopyButton, Dialog, Empty, ErrorNote, Heading, Loading, SelectField, TextField, When,
} from "../ui.js";

const SCOPES = [
  ["infer", "infer: send requests"],
  ["publish", "publish: change the tenant's adapters"],
  ["train", "train: files and training jobs"],
  ["admin", "admin: operate the server, for every tenant"],
];
const LIFETIMES = [["", "Never"], ["604800", "In 7 days"], ["2592000", "In 30 days"], ["7776000", "In 90 days"], ["31536000", "In a year"]];
// A table of thousands of rows makes each key that is typed slow.
const SHOWN = 100;
const TONES = { active: "good", expired: "warn", revoked: "danger" };

export default function Keys({ me }) {
  const [tenant, setTenant] = useState("");
  const { data, error, loading, reload } = useLoad((signal) => get("/v1/keys", {}, signal), []);
  const [dialog, setDialog, close] = useDialog();
  const [shown, setShown] = useState(SHOWN);
  const wanted = tenant.trim().toLowerCase();
  // The newest first: what was just made is in sight.
  const keys = (data?.keys ?? []).filter((key) => key.tenant.includes(wanted)).reverse();
  return html`
    <${Heading} title="Keys" lead="A key acts for one tenant. Its secret is shown once, when it is made.">
      <${Button} kind="primary" icon="plus" onClick=${() => setDialog({ kind: "create" })}>New key<//>
    <//>
    <div class="filters"><${TextField} label="Tenant" type="search" value=${tenant} onValue=${setTenant} placeholder="all tenants" /></div>
    <${ErrorNote} error=${error} retry=${reload} />
    ${!data && loading && html`<${Loading} />`}
    ${data && keys.length === 0 && html`<${Empty} title=${tenant ? "No key of this tenant" : "No key yet"}>
      ${!tenant && html`<p>This server asks for a key as soon as one exists. Make one with the scope <code>admin</code> first: you
        need it to come back here.</p>`}<//>`}
    ${data && keys.length > 0 && html`<p class="result-line" role="status">${partOf(keys.length, shown, "key", "newest")}</p>`}
    ${keys.length > 0 && html`<div class="table-box"><table class="stacked">
      <thead><tr><th scope="col">Key</th><th scope="col">Tenant</th><th scope="col">Scopes</th><th scope="col">State</th>
        <th scope="col">Made</th><th scope="col">Expires</th><th scope="col"><span class="sr-only">Actions</span></th></tr></thead>
      <tbody>${keys.slice(0, shown).map((key) => html`<tr key=${key.id}>
        <th scope="row">${key.name && html`${key.name}<br />`}<code>${key.id}</code></th>
        <td data-label="Tenant" class="breaks">${key.tenant}</td>
        <td data-label="Scopes"><span class="account-scopes">${key.scopes.map((scope) => html`<${Badge} key=${scope}
          tone=${scope === "admin" ? "violet" : "plain"}>${scope}<//>`)}</span></td>
        <td data-label="State"><${Badge} tone=${TONES[key.status]}>${key.status}<//></td>
        <td data-label="Made"><${When} at=${key.created_at} /></td>
        <td data-label="Expires">${key.expires_at ? html`<${When} at=${key.expires_at} />` : "never"}</td>
        <td class="row-actions">${key.status === "active" && html`<${Button} kind="quiet danger-text"
          aria-label=${`Revoke ${key.id}`} onClick=${() => setDialog({ kind: "revoke", key })}>Revoke<//>`}</td>
      </tr>`)}</tbody>
    </table></div>`}
    ${keys.length > shown && html`<p class="more"><${Button} onClick=${() => setShown(shown + SHOWN)}>Show more<//></p>`}
    ${dialog?.kind === "create" && html`<${CreateDialog} me=${me} onClose=${close}
      onMade=${(made) => setDialog({ kind: "made", made })} />`}
    ${dialog?.kind === "made" && html`<${SecretDialog} me=${me} made=${dialog.made} onClose=${() => {
      close();
      // The first key closes the server: who made it goes on with it. Not before the secret is copied.
      if (me.needs_keys) reload();
      else if (dialog.made.scopes.includes("admin")) signIn(dialog.made.secret).catch(begin);
      else begin();
    }} />`}
    ${dialog?.kind === "revoke" && html`<${RevokeDialog} me=${me} item=${dialog.key} onClose=${close} onDone=${() => {
      notify(`The key ${dialog.key.id} is revoked.`);
      close();
      reload();
    }} />`}`;
}

function CreateDialog({ me, onClose, onMade }) {
  const [tenant, setTenant] = useState("");
  const [name, setName] = useState("");
  const [lifetime, setLifetime] = useState("");
  const [scopes, setScopes] = useState(me.needs_keys ? ["infer"] : ["admin"]);
  const action = useAction(async () => {
    const body = { tenant: tenant.trim(), scopes };
    if (name.trim()) body.name = name.trim();
    if (lifetime) body.expires_in_s = Number(lifetime);
    onMade(await send("POST", "/v1/keys", body));
  });
  const canMake = tenant.trim() && scopes.length > 0;
  const tick = (scope, isOn) => setScopes(isOn ? [...scopes, scope] : scopes.filter((each) => each !== scope));
  return html`<${Dialog} title="New key" onClose=${onClose} onSubmit=${() => canMake && action.run()} footer=${html`
      <${Button} onClick=${onClose}>Cancel<//>
      <${Button} kind="primary" type="submit" busy=${action.busy} disabled=${!canMake}>Make the key<//>`}>
    <${TextField} label="Tenant" value=${tenant} onValue=${setTenant} placeholder="acme" help="The key acts for this tenant alone." />
    <fieldset><legend class="legend-title">Scopes</legend>
      ${SCOPES.map(([scope, text]) => html`<div key=${scope}><${Check} checked=${scopes.includes(scope)}
        onValue=${(isOn) => tick(scope, isOn)}>${text}<//></div>`)}
    </fieldset>
    <${TextField} label="Name (optional)" value=${name} onValue=${setName} placeholder="web shop" help="For people: where the key is used." />
    <${SelectField} label="Expires" value=${lifetime} options=${LIFETIMES} onValue=${setLifetime} />
    ${!me.needs_keys && !scopes.includes("admin") && html`<p class="note warn">From this key on, the server asks everyone for a
      key. Without a key with the scope admin you cannot come back here.</p>`}
    <${ErrorNote} error=${action.error} />
  <//>`;
}

// The focus is on the button that copies: a second Enter must not close what is shown once.
function SecretDialog({ me, made, onClose }) {
  return html`<${Dialog} title="Copy the key now" onClose=${onClose} onSubmit=${onClose} footer=${html`
      <${Button} kind="primary" type="submit">I have it<//>`}>
    <p>This is the only time that the secret of <code>${made.id}</code> is shown. The server keeps a hash alone.</p>
    <div class="secret"><code>${made.secret}</code><${CopyButton} text=${made.secret} what="Copy the secret" data-first="" /></div>
    <p class="help">Tenant ${made.tenant}; ${made.scopes.join(", ")}.</p>
    ${!me.needs_keys && html`<p class="note warn">This server asks everyone for a key from now on.</p>`}
  <//>`;
}

function RevokeDialog({ me, item, onClose, onDone }) {
  const action = useAction(() => send("DELETE", path`/v1/keys/${item.id}`));
  return html`<${Confirm} title=${`Revoke ${item.name || item.id}?`} verb="Revoke" action=${action} onClose=${onClose} onDone=${onDone}>
    <p>Requests with this key are refused at once. Nobody can bring it back.</p>
    ${item.id === me.key_id && html`<p><strong>It is the key that you use now.</strong></p>`}
  <//>`;
}
