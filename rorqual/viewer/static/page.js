// The page: title, settings, theme; then each section once.

function showTitle() {
  byId("title").textContent = data.name;
  const first = data.sessions[0];
  const versions = first.versions;
  const resumed = data.sessions.length > 1 ? `, resumed ${data.sessions.length - 1} ×` : "";
  const commit = first.git ? `, commit ${first.git.commit.slice(0, 10)}${first.git.dirty ? " with changes" : ""}` : "";
  byId("subtitle").textContent = `Started ${first.started.replace("T", " ").slice(0, 16)} UTC${resumed} · rorqual ` +
    `${versions.rorqual}${commit} · torch ${versions.torch} · Python ${versions.python}`;
}

function showSettings() {
  const block = (title, value) => make("details", {}, [make("summary", {}, title), make("pre", {}, JSON.stringify(value, null, 2))]);
  byId("settings-body").append(block("Configuration", data.config), block("Seeds", data.seeds), block("Sessions", data.sessions));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  const redraw = () => {
    redrawCharts();
    redrawHeldOut();
    redrawMaps();
    if (data.rollouts.length) drawRollouts();
  };
  dark.addEventListener("change", () => { setTheme(dark.matches ? "dark" : "light"); redraw(); });
  byId("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    redraw();
  });
}

/** Beside the pointer: what is known of the token, or of the cell of a map, that it points at. */
function showTooltip(event) {
  const tooltip = byId("tooltip");
  const content = tokenTooltip(event) || mapTooltip(event);
  tooltip.hidden = !content;
  if (!content) return;
  tooltip.replaceChildren(...content);
  const box = tooltip.getBoundingClientRect();
  tooltip.style.left = `${Math.min(event.clientX + 14, innerWidth - box.width - 8)}px`;
  tooltip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18}px`;
}

startTheme();
showTitle();
showResults();
showHeldOut();
showMaps();
showCurves();
showRollouts();
showSettings();
document.addEventListener("pointermove", showTooltip);
