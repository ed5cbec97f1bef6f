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
const seen = {pages: pages.length, links: 0, images: 0, formulas: 0, texts: 0, computed: 0};
const browser = await chromium.launch({executablePath, args: ["--no-sandbox"]});

function which(command) {
  try { return execFileSync("which", [command], {encoding: "utf8"}).trim(); } catch { return null; }
}

// Contrast of every text, those that axe leaves undecided (cut off by a scrolling box, a single character, over a
// drawing) by painting what lies under their middle; runs in the browser. Returns {texts, computed, faults}.
async function contrast() {
  const {violations, incomplete, passes} = await axe.run({preload: false, elementRef: true, runOnly: {type: "rule", values: ["color-contrast"]}});
  const nodes = results => results.flatMap(result => result.nodes), faults = [];
  const paint = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const lay = (colour, opacity = 1) => { paint.globalAlpha = opacity; paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); };
  const luminance = () => {
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  for (const {element} of nodes(incomplete)) {
    element.scrollIntoView({block: "center", inline: "center"});
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2), at = stack.indexOf(element);
    const under = at < 0 ? [] : stack.slice(at);
    if (at < 0) for (let up = element; up; up = up.parentElement) under.push(up);
    under.push(document.body, document.documentElement);  // whose colours fill the page, wherever their boxes end
    const unknown = under.find(node => /^(IMG|CANVAS|VIDEO)$/.test(node.tagName) || getComputedStyle(node).backgroundImage !== "none");
    lay("white");
    for (const node of under.reverse()) {
      const {backgroundColor, fill, fillOpacity} = getComputedStyle(node);
      lay(backgroundColor);
      if (node instanceof SVGGeometryElement && fill !== "none") lay(fill, Number(fillOpacity));
    }
    const back = luminance();
    lay(element instanceof SVGElement ? style.fill : style.color);
    const front = luminance(), ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    const size = parseFloat(style.fontSize), needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if (unknown || ratio < needed) faults.push(`${unknown ? "over an image" : ratio.toFixed(2)} at ${element.outerHTML.slice(0, 120)}`);
  }
  for (const node of nodes(violations)) faults.push(`${node.any[0]?.data?.contrastRatio} at ${node.html.slice(0, 120)}`);
  return {texts: nodes(passes).length + nodes(violations).length + nodes(incomplete).length, computed: nodes(incomplete).length, faults};
}

// What reaches beyond the right edge of a narrow screen, outside of boxes that scroll; runs in the browser.
function tooWide() {
  const edge = document.documentElement.clientWidth, scrolls = node => /auto|scroll/.test(getComputedStyle(node).overflowX);
  const text = document.querySelector("article") ?? document.body;  // the theme would let all of it scroll
  const inside = node => node !== text && (scrolls(node) || inside(node.parentElement));
  const wide = [...text.querySelectorAll("*")]
    .filter(node => node.getBoundingClientRect().right > edge + 0.5 && !inside(node.parentElement) && getComputedStyle(node).visibility !== "hidden");
  return {page: document.documentElement.scrollWidth - edge, wide: wide.map(node => node.outerHTML.slice(0, 100))};
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
  await page.evaluate(() => document.querySelectorAll("details").forEach(folded => { folded.open = true; }));
  await page.addScriptTag({path: axe});
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({colorScheme});
    const rules = {preload: false, runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], rules: {"color-contrast": {enabled: false}}};
    const {violations} = await page.evaluate(rules => axe.run(rules), rules);
    for (const {id, nodes} of violations) {
      fault(`axe, ${colorScheme}: ${id}, ${nodes.length} times, such as ${nodes[0].html.slice(0, 120)} ${nodes[0].any[0]?.message ?? ""}`);
    }
    const texts = await page.evaluate(contrast);
    for (const words of texts.faults) fault(`color-contrast, ${colorScheme}: ${words}`);
    seen.texts += texts.texts;
    seen.computed += texts.computed;
  }
  await page.setViewportSize({width: 390, height: 844});
  await page.evaluate(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))));
  const {page: sideways, wide} = await page.evaluate(tooWide);
  if (sideways > 0) fault(`scrolls sideways by ${sideways} px on a screen of 390 px`);
  if (wide.length) fault(`beyond a screen of 390 px, ${wide.length} times, such as ${wide[0]}`);
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
console.log(`${seen.pages} pages, ${seen.links} internal links, ${seen.images} images, ${seen.formulas} formulas, ${seen.texts} contrasts (${seen.computed} of them computed here): ${faults.size} faults`);
process.exit(faults.size ? 1 : 0);
