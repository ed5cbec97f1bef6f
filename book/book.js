// What the theme leaves undone for readers who use the keyboard or listen.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const node of document.querySelectorAll("pre, .output, .math-wrapper, .table-wrapper")) {
    if (node.scrollWidth > node.clientWidth) node.tabIndex = 0;  // else arrow keys cannot scroll it
  }
  for (const node of document.querySelectorAll("summary[aria-label]")) node.removeAttribute("aria-label");  // hides its text
});
