// What a view says where the base of the server does not do what the view is for.

import { address } from "./api.js";
import { html } from "./html.js";
import { href } from "./router.js";
import { may } from "./session.js";
import { Heading } from "./ui.js";

const IMAGES = ["vision", "dual"];
const READS = { encoder: "texts", vision: "images", dual: "images and texts" };

// By the view's name: the kinds of bases that it is not for, and what it then says.
const UNSERVED = {
  playground: { kinds: ["encoder", ...IMAGES], Says: NoText },
  classify: { kinds: IMAGES, Says: NoTextToClassify },
  training: { kinds: IMAGES, Says: NoJobs },
};

/** Whether a view is for bases of another kind. */
export function isForAnotherBase(name, me) {
  return UNSERVED[name]?.kinds.includes(me.base.kind) ?? false;
}

/** What such a view shows: why, and what to do. */
export function WrongBase({ me, name, title }) {
  return html`<${Heading} title=${title} /><div class="empty"><${UNSERVED[name].Says} me=${me} /></div>`;
}

function NoText({ me }) {
  return html`<h2>The base ${me.base.name} does not generate</h2>
    <p>It reads ${READS[me.base.kind]}. The playground needs a server of a base that generates.</p>
    <p>The view <a href=${href(["classify"])}>Classify</a> is for this base.</p>`;
}

function NoTextToClassify({ me }) {
  return html`<h2>The base ${me.base.name} classifies images</h2>
    <p>This view sends texts. Send images to the server's API, JPEG, PNG or WebP, up to its limit in one request:</p>
    <p><code>curl ${me.needs_keys && '-H "Authorization: Bearer KEY" '}-F adapter=TENANT/NAME -F image=@photo.jpg
      ${` ${address("/v1/classify")}`}</code></p>
    <p>The <a href=${href(["adapters"], { task: "image-classify" })}>adapters of task image-classify</a> take them.
      ${` /v1/embeddings`} makes vectors of ${READS[me.base.kind]}.</p>`;
}

function NoJobs({ me }) {
  return html`<h2>The base ${me.base.name} has no training jobs</h2>
    <p>It reads images, and a job's files are rows of texts. Train an adapter on images with the command
      ${" "}<code>train_adapter</code>${may(me, "publish") && html`, then <a href=${href(["upload"])}>upload</a> it`}.</p>`;
}
