"""What the browser gets from `voting`: one page, its script and its style. Names and prompts become text
only."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Votes</title>
<link rel="stylesheet" href="/page.css">
<script src="/page.js" defer></script>
</head>
<body>
<form id="who">
<label>Your name <input id="name" maxlength="64" required autocomplete="off"></label>
<button>Begin</button>
</form>
<main id="poll" hidden>
<h1 id="prompt"></h1>
<p id="left"></p>
<div id="images"></div>
<button id="send" disabled>Keep these votes</button>
</main>
<p id="message" role="status"></p>
</body>
</html>
"""

STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
#images { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
figure { margin: 0; }
img { width: 100%; image-rendering: auto; }
fieldset { border: 0; padding: 0; margin: .3rem 0; }
legend { float: left; width: 6rem; }
label { margin-right: .5rem; }
button { font: inherit; margin-top: 1rem; }
"""

SCRIPT = """
"use strict";
const find = (id) => document.getElementById(id);
let question = null;

async function ask(path, body) {
  const reply = await fetch(path, {
    method: "POST",
    headers: {"Content-Type": "application/json"},
    body: JSON.stringify(body),
  });
  const fields = await reply.json();
  if (!reply.ok) throw new Error(fields.error || reply.statusText);
  return fields;
}

function choice(candidate, criterion, value) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  input.type = "radio";
  input.name = `${candidate} ${criterion}`;
  input.value = value;
  label.append(input, String(value));
  return label;
}

function figure(candidate) {
  const figure = document.createElement("figure");
  const image = document.createElement("img");
  image.src = `/image/${question.prompt}/${candidate}`;
  image.alt = "";
  figure.append(image);
  for (const criterion of question.criteria) {
    const row = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = criterion;
    row.append(legend);
    for (let value = 1; value <= question.scale; value++) row.append(choice(candidate, criterion, value));
    figure.append(row);
  }
  return figure;
}

function votes() {
  const found = {};
  for (const candidate of question.candidates) {
    found[candidate] = {};
    for (const criterion of question.criteria) {
      const chosen = document.querySelector(`input[name="${candidate} ${criterion}"]:checked`);
      if (chosen === null) return null;
      found[candidate][criterion] = Number(chosen.value);
    }
  }
  return found;
}

async function next() {
  question = await ask("/question", {voter: find("name").value});
  find("who").hidden = true;
  find("poll").hidden = question.left === 0;
  find("message").textContent = question.left === 0 ? "Nothing is left to judge. Thank you." : "";
  if (question.left === 0) return;
  find("prompt").textContent = question.text || "(no prompt)";
  find("left").textContent = `${question.left} left; 1 is worst, ${question.scale} is best`;
  find("images").replaceChildren(...question.candidates.map(figure));
  find("send").disabled = true;
  scrollTo(0, 0);
}

function show(error) { find("message").textContent = error.message; }

find("who").addEventListener("submit", (event) => { event.preventDefault(); next().catch(show); });
find("images").addEventListener("change", () => { find("send").disabled = votes() === null; });
find("send").addEventListener("click", () => {
  find("send").disabled = true;
  ask("/vote", {voter: find("name").value, prompt: question.prompt, votes: votes()}).then(next).catch(show);
});
"""
