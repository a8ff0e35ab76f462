// Where a person types in a key.

import { html, useEffect, useRef, useState } from "../html.js";
import { ConnectionLost } from "../api.js";
import { Mark } from "../icons.js";
import { signIn } from "../session.js";
import { connectionEpoch, useAction } from "../store.js";
import { Button, ErrorNote, TextField } from "../ui.js";

export default function SignIn({ error }) {
  const [secret, setSecret] = useState("");
  const action = useAction(() => signIn(secret.trim()));
  const form = useRef(null);
  useEffect(() => form.current.querySelector("input").focus(), []);
  const wasLost = action.error instanceof ConnectionLost;
  useEffect(() => (wasLost ? connectionEpoch.watch(() => action.run()) : undefined), [wasLost]);
  const submit = (event) => {
    event.preventDefault();
    if (secret.trim()) action.run();
  };
  return html`<main class="alone">
    <form ref=${form} class="card sign-in" onSubmit=${submit}>
      <${Mark} />
      <h1>sera-serve console</h1>
      <p class="lead">Your key says which tenant you act for, and what you may do.</p>
      <${TextField} label="Key" type="password" value=${secret} onValue=${setSecret} placeholder="sk-sera-..."
        help="It stays in this browser tab, and goes when you close the tab." />
      <${Button} kind="primary" type="submit" busy=${action.busy} disabled=${!secret.trim()}>Sign in<//>
      <${ErrorNote} error=${action.error ?? error} />
      <p class="help">No key yet? The operator of this server makes one:${" "}
        <code>sera-serve keys create</code></p>
    </form>
  </main>`;
}
