// The form that changes the limits while requests run.

import { bytes } from "./format.js";

export class Limits {
  constructor(form) {
    this.form = form;
    this.answer = form.querySelector("#answer");
    this.button = form.querySelector("button");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
  }

  // What the server says: the limits, and whether who looks may change them.
  show(snapshot, admin, resizable) {
    const { device, host } = this.form.elements;
    device.placeholder = bytes(snapshot.limit_bytes).replace("\u00a0", "");
    host.placeholder = bytes(snapshot.host_limit_bytes).replace("\u00a0", "");
    this.form.querySelector("#host-field").hidden = !snapshot.host_limit_bytes;
    this.form.querySelector("#key-field").hidden = admin || !resizable;
    this.button.disabled = this.busy || !resizable;
    if (!resizable) {
      this.say("", "Nobody may resize: the server was started without an admin key.");
    }
  }

  say(kind, text) {
    this.answer.className = kind;
    this.answer.textContent = text;
  }

  async send() {
    const { device, host, key } = this.form.elements;
    const wanted = {};
    if (device.value.trim()) wanted.device_memory = device.value.trim();
    if (host.value.trim()) wanted.host_memory = host.value.trim();
    if (!Object.keys(wanted).length) {
      this.say("bad", "Write a size, for example 2GiB.");
      return;
    }
    const headers = { "content-type": "application/json" };
    if (key.value) headers.authorization = `Bearer ${key.value}`;
    this.busy = this.button.disabled = true;
    this.say("", "Resizing \u2026");
    try {
      const body = JSON.stringify(wanted);
      const reply = await fetch("dashboard/resize", { method: "POST", headers, body });
      const said = await reply.json();
      if (!reply.ok) throw new Error(said.error?.message ?? `the server answered ${reply.status}`);
      const parts = [`Device memory is ${bytes(said.limit_bytes)} now`];
      if (said.host_limit_bytes) parts.push(`host memory ${bytes(said.host_limit_bytes)}`);
      this.say("good", `${parts.join(", ")}.`);
      device.value = host.value = "";
    } catch (error) {
      this.say("bad", error.message);
    } finally {
      this.busy = this.button.disabled = false;
    }
  }
}
