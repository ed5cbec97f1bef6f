// Opens every page of a built book in Chromium, light and dark: node book/check.mjs build/book [path of Chromium]
// Prints a line per fault and ends with status 1 if there was one. Needs `npm install --prefix book`.
import { execFileSync } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const folder = resolve(process.argv[2] ?? "build/book");
const executablePath = process.argv[3] ?? ["chromium", "chromium-browser", "google-chrome"].map(which).find(Boolean);
if (!executablePath || !existsSync(`${folder}/index.html`)) {
  console.log(executablePath ? `no book in ${folder}: make book` : "no Chromium on the path");
  process.exit(2);
}
const pages = readdirSync(folder).filter(name => name.endsWith(".html")).sort();
const faults = new Set(), anchors = new Map(), links = [];
const seen = {pages: pages.length, links: 0, images: 0, formulas: 0};
const browser = await chromium.launch({executablePath, args: ["--no-sandbox"]});

function which(command) {
  try { return execFileSync("which", [command], {encoding: "utf8"}).trim(); } catch { return null; }
}

// What one page holds; runs in the browser.
async function look() {
  await window.MathJax?.startup?.promise;
  const visible = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT, node =>
    node.parentElement.closest("pre, code, script, style, textarea, mjx-container") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
  const raw = [];
  while (visible.nextNode()) if (/\$|\\[([]|\\[a-z]+\{/.test(visible.currentNode.data)) raw.push(visible.currentNode.data.trim().slice(0, 60));
  const formulas = [...document.querySelectorAll(".math")];
  return {
    raw,
    formulas: formulas.length,
    bare: formulas.filter(node => !node.querySelector("mjx-container svg")).map(node => node.textContent.slice(0, 60)),
    wrong: [...document.querySelectorAll("[data-mjx-error]")].map(node => node.getAttribute("data-mjx-error")),
    images: document.images.length,
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src.slice(0, 80)),
    silent: [...document.images].filter(image => !image.alt.trim()).map(image => image.src.slice(0, 80)),
    links: [...document.querySelectorAll("a[href]")].map(link => link.href),
    anchors: [...document.querySelectorAll("[id]")].map(node => node.id),
  };
}

for (const name of pages) {
  const fault = words => faults.add(`${name}: ${words}`), page = await browser.newPage({reducedMotion: "reduce"});
  page.on("console", message => message.type() === "error" && fault(`console: ${message.text()}`));
  page.on("pageerror", error => fault(`script: ${error.message}`));
  page.on("requestfailed", request => fault(`not loaded: ${request.url().slice(0, 80)}`));
  page.on("request", request => /^(file|data|blob):/.test(request.url()) || fault(`asks the network for ${request.url()}`));
  await page.goto(pathToFileURL(`${folder}/${name}`).href);
  const found = await page.evaluate(look);
  for (const text of found.raw) fault(`raw TeX: ${text}`);
  for (const text of found.bare) fault(`formula not drawn: ${text}`);
  for (const text of found.wrong) fault(`formula not understood: ${text}`);
  for (const source of found.broken) fault(`image not shown: ${source}`);
  for (const source of found.silent) fault(`image without alternative text: ${source}`);
  anchors.set(name, new Set(found.anchors));
  links.push(...found.links.filter(url => url.startsWith("file:")).map(url => [name, url]));
  seen.images += found.images;
  seen.formulas += found.formulas;
  await page.addScriptTag({path: axe});
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({colorScheme});
    const {violations} = await page.evaluate(() => axe.run({preload: false, runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}));
    for (const {id, nodes} of violations) {
      fault(`axe, ${colorScheme}: ${id}, ${nodes.length} times, such as ${nodes[0].html.slice(0, 120)} ${nodes[0].any[0]?.message ?? ""}`);
    }
  }
  await page.close();
}

for (const [name, url] of links) {
  const {pathname, hash} = new URL(url), file = fileURLToPath(`file://${pathname}`);
  const target = file.slice(folder.length + 1), id = decodeURIComponent(hash.slice(1));
  if (!file.startsWith(folder) || !existsSync(file)) faults.add(`${name}: link to nothing: ${url}`);
  else if (id && !anchors.get(target)?.has(id)) faults.add(`${name}: no such place: ${target}#${id}`);
  seen.links += 1;
}

const page = await browser.newPage();
await page.goto(`${pathToFileURL(`${folder}/search.html`).href}?q=multiplier`);
await page.waitForSelector("#search-results li a", {timeout: 20000}).catch(() => faults.add("search.html: finds nothing for multiplier"));
await browser.close();

for (const line of faults) console.log(line);
console.log(`${seen.pages} pages, ${seen.links} internal links, ${seen.images} images, ${seen.formulas} formulas: ${faults.size} faults`);
process.exit(faults.size ? 1 : 0);
