// Radio buttons with pictures. Choosing one gives `change`, which the page listens to.
element.addEventListener('change', (event) => {
  if (event.target.name !== 'picked') return;
  event.stopPropagation();
  props.value = event.target.value;
  trigger('input');
});
