// What the theme leaves undone for readers who use the keyboard or listen.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const node of document.querySelectorAll("pre, .output, .math-wrapper, .table-wrapper")) {
    if (node.scrollWidth > node.clientWidth) node.tabIndex = 0;  // else arrow keys cannot scroll it
  }
  const fit = () => {  // an inline formula does not break: one that is wider than its line scrolls in a box of its own
    for (const node of document.querySelectorAll("span.math")) {
      node.classList.remove("wide");
      const line = node.closest("p, li, dd, td, th, figcaption, h1, h2, h3");
      if (line && node.getBoundingClientRect().width > line.clientWidth + 1) node.classList.add("wide"), node.tabIndex = 0;
    }
  };
  fit();
  addEventListener("resize", fit);
  for (const node of document.querySelectorAll("summary[aria-label]")) node.removeAttribute("aria-label");  // hides its text
});
